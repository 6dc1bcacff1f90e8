"""Run the fuzz targets: ``python -m tests.fuzz [--seconds S | --executions N] [TARGET ...]``."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.build import C_TARGETS, ROOT, build_extension, build_program
from tests.fuzz.corpus import pack, seeds, unpack, write
from tests.fuzz.targets import TARGETS

BUILD = ROOT / "build" / "fuzz"
TIMEOUT = 10
"""Seconds that one input may take."""
MEMORY = 1024
"""MiB that a target may have; twice that with sanitizers in it, which keep what was freed."""
IN_PYTHON = 10
"""The targets in Python, which are slow, share one in so many of the executions."""
KEPT, KEPT_HEAD = 64 << 10, 128
"""Most bytes of a target's inputs in the tree, and what each takes besides."""


@dataclass(frozen=True)
class Job:
    """A target, ready to be run.

    Attributes:
        name: of the target.
        command: that runs it, without libFuzzer's options.
        environment: what it needs besides ours.
        longest: most bytes of an input.
        memory: its limit in MiB.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    longest: int
    memory: int

    @property
    def place(self) -> Path:
        return BUILD / self.name

    def run(self, *options: str) -> tuple[int, str]:
        """Run it under libFuzzer; returns its exit status and all that it said."""
        shared = Path("/dev/shm")
        scratch = (shared if shared.is_dir() else BUILD) / f"ovr-fuzz-{os.getpid()}"
        scratch.mkdir(exist_ok=True)
        environment = {
            **os.environ, **self.environment,
            "TMPDIR": str(scratch), "XDG_CACHE_HOME": str(scratch / "cache"),
        }  # fmt: skip
        try:
            with (self.place / "log").open("w") as log:
                done = subprocess.run(
                    [*self.command, *self._limits(), *options], cwd=ROOT, env=environment,
                    stdout=log, stderr=log, check=False,
                )  # fmt: skip
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return done.returncode, (self.place / "log").read_text(errors="replace")

    def _limits(self) -> list[str]:
        return [
            f"-max_len={self.longest}", f"-timeout={TIMEOUT}", f"-rss_limit_mb={self.memory}",
            f"-artifact_prefix={self.place}/finding-", "-print_final_stats=1",
        ]  # fmt: skip

    def corpora(self) -> list[str]:
        """Directories with inputs, the one that grows first."""
        grown, given = self.place / "corpus", self.place / "seeds"
        shutil.rmtree(given, ignore_errors=True)
        write(given, seeds(self.name))
        grown.mkdir(parents=True, exist_ok=True)
        return [str(grown), str(given)]


def prepare(name: str) -> Job:
    """Build what a target needs."""
    (BUILD / name).mkdir(parents=True, exist_ok=True)
    if name in C_TARGETS:
        target = C_TARGETS[name]
        program = build_program(target, BUILD / name / "build")
        return Job(name, (str(program),), {}, target.longest, 2 * MEMORY)
    command = (sys.executable, "-m", "tests.fuzz.worker", name)
    longest = TARGETS[name].longest
    if not TARGETS[name].native:
        return Job(name, command, {}, longest, MEMORY)
    import atheris  # noqa: PLC0415 - `make fuzz` installs it; `parse` does without

    environment = {
        "OVR_FUZZ_NATIVE": str(build_extension(BUILD / "extension")),
        "LD_PRELOAD": str(Path(atheris.path()) / "asan_with_fuzzer.so"),
        # Python itself leaks at its end; what it allocates may fail.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=64",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    return Job(name, command, environment, longest, 2 * MEMORY)


def fuzz(job: Job, options: Sequence[str]) -> tuple[bool, int]:
    """Run a target and say what came of it; returns whether it passed, and its executions."""
    started = time.monotonic()
    status, said = job.run(*options, *job.corpora())
    found = re.findall(r"^stat::number_of_executed_units: +(\d+)$", said, re.MULTILINE)
    executions = int(found[-1]) if found else 0
    passed = status == 0 and executions > 0
    took = time.monotonic() - started
    verdict = "passed" if passed else "FAILED"
    print(f"{verdict}  {job.name:14} {executions:>9} executions in {took:.0f} s")
    if not passed:
        print("\n".join(said.splitlines()[-40:]))
        print(f"the input is in {job.place}/finding-*, all of the output in {job.place}/log")
    sys.stdout.flush()
    return passed, executions


def keep(job: Job) -> None:
    """Put what was found into the tree, the smallest inputs first."""
    found = [file.read_bytes() for file in (job.place / "corpus").iterdir()]
    kept, size = [], 0
    for data in sorted({*unpack(job.name), *found}, key=lambda data: (len(data), data)):
        size += len(data) + KEPT_HEAD
        if size > KEPT:
            break
        kept.append(data)
    pack(job.name, kept)
    print(f"{job.name}: {len(kept)} inputs kept")


def limits(names: Sequence[str], seconds: int | None, executions: int | None) -> dict[str, str]:
    """libFuzzer's option for how long each target runs."""
    if executions is None:
        return dict.fromkeys(names, f"-max_total_time={seconds or 20}")
    python = [name for name in names if name in TARGETS]
    native = [name for name in names if name not in TARGETS]
    slow = executions // IN_PYTHON if native else executions
    found = {name: f"-runs={-(-slow // len(python))}" for name in python}
    left = executions - slow if python else executions
    return found | {name: f"-runs={-(-left // len(native))}" for name in native}


NAMES = (*TARGETS, *C_TARGETS)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--seconds", type=int, help="for each target; 20 if nothing is said")
    how_long.add_argument("--executions", type=int, help="of all targets together")
    parser.add_argument("--keep", action="store_true", help="put what was found into the corpus")
    asked = parser.parse_args(arguments)
    if unknown := {*asked.targets} - {*NAMES}:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    return asked


def main() -> int:
    asked = parse()
    chosen = asked.targets or NAMES
    each = limits(chosen, asked.seconds, asked.executions)
    results = []
    for name in chosen:
        job = prepare(name)
        results.append(fuzz(job, [each[name]]))
        if asked.keep and results[-1][0]:
            keep(job)
    print(f"{sum(executions for _, executions in results)} executions in all")
    passed = sum(passed for passed, _ in results)
    print(f"{passed} passed, {len(results) - passed} failed")
    return int(passed < len(results))


if __name__ == "__main__":
    sys.exit(main())
