"""Restore programs that have very much of one thing, by CRIU alone and from outside.

``python -m tests.shapes [SHAPE…] [--suite NAME] [--some | --few]``
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ovr
from ovr import lab
from ovr.errors import OvrError
from ovr.lab import demo
from ovr.lab.share import SHARE
from tests.vm import pool

SOURCE = Path(__file__).with_name("shape")
KINDS = {
    "threads": "10,000 threads",
    "processes": "600 processes",
    "areas": "60,000 areas",
    "descriptors": "20,000 descriptors",
    "reserved": "400 GiB reserved",
    "high": "memory above 47 bits",
    "stopped": "a process that is stopped",
}
LIMITS = "sysctl -q kernel.threads-max=100000 vm.max_map_count=1000000 fs.nr_open=1048576"


@dataclass
class Outcome:
    """Of one shape: seconds and what was wrong, for CRIU alone and for `ovr`."""

    name: str
    dump: float = 0.0
    alone: float = 0.0
    outside: float = 0.0
    longest: float = 0.0
    wrong: str = ""

    def __str__(self) -> str:
        figures = (
            f"dump {self.dump:7.1f} s   CRIU alone {self.alone:7.1f} s   ovr {self.outside:7.1f} s"
            f"   longest hold {self.longest * 1e3:4.0f} ms"
        )
        return f"{KINDS[self.name]:<28}{figures}   {self.wrong or 'ok'}"


def program_of(kind: str, part: str) -> pool.Program:
    """Return the program; each has pids of its own."""
    number = 50 + 25 * [*KINDS].index(kind)  # ten thousand pids each
    words = ("areas", "few") if kind == "stopped" else (kind, part)
    return pool.Program(
        f"many-{kind[:5]}", number, tree=kind == "processes", source=str(SOURCE), args={"": words}
    )


def try_one(vm: lab.LabVm, share: Path, kind: str, part: str) -> Outcome:
    """Dump, and restore both ways, one after the other into the same VM."""
    outcome = Outcome(kind)
    program = program_of(kind, part)
    directory = f"{SHARE}/{kind}"
    pool.install(vm, program)
    pid = pool.start(vm, program)
    if kind == "stopped":
        vm.sh(f"kill -STOP {pid}; sleep 1")
    (share / kind).mkdir()
    outcome.dump = timed(lambda: pool.dump(vm, program, pid, directory))
    outcome.alone = timed(lambda: pool.restore_plain(vm, program, directory))
    outcome.wrong = wrong(vm, program, kind, "CRIU alone")
    pool.end(vm, program)
    with ovr.attach(f"lab:{vm.name}") as attached:
        report = attached.restore(share / kind, verify="full")
    outcome.outside, outcome.longest = report.seconds["total"], report.held["longest"]
    outcome.wrong += wrong(vm, program, kind, "ovr")
    pool.end(vm, program)
    return outcome


def wrong(vm: lab.LabVm, program: pool.Program, kind: str, who: str) -> str:
    """Have the program check itself; return what it found, or nothing."""
    if kind == "stopped":
        pid = pool.root_pid(vm, program)
        state = vm.sh(f"grep State: /proc/{pid}/status").stdout.decode()
        if "T (stopped)" not in state:
            return f"[{who}: {state.strip()}]"
        vm.sh(f"kill -CONT {pid}")
    found = pool.ask(vm, program)
    return "" if found["ok"] else f"[{who}: {found['wrong'][0]}]"


def timed(act: Callable[[], object]) -> float:
    """Return how many seconds it takes."""
    start = time.monotonic()
    act()
    return time.monotonic() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Try shapes, print a line for each; 1 if one is not restored as it was."""
    parser = argparse.ArgumentParser(prog="tests.shapes", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="SHAPE", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--suite", default="trixie")
    parts = parser.add_mutually_exclusive_group()
    for part, how in (("some", "a fifth"), ("few", "a hundredth")):
        parts.add_argument(
            f"--{part}", dest="part", action="store_const", const=part, default="all",
            help=f"{how} of each",
        )  # fmt: skip
    parser.add_argument("--memory", default="2G")
    options = parser.parse_args(arguments)
    good = True
    for kind in options.kinds or KINDS:
        with (
            tempfile.TemporaryDirectory(prefix="ovr-shapes-") as directory,
            demo.lab_vm(
                f"shapes-{kind}", suite=options.suite, memory=options.memory, la57=True,
                share=Path(directory),
            ) as vm,
        ):  # fmt: skip
            vm.sh(LIMITS)
            try:
                outcome = try_one(vm, Path(directory), kind, options.part)
            except (OvrError, AssertionError) as error:
                outcome = Outcome(kind, wrong=f"{type(error).__name__}: {error}")
            print(outcome, flush=True)
            good &= not outcome.wrong
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
