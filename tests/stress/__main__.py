"""Restore again and again into a guest that moves, merges, swaps and reuses all of its memory.

``python -m tests.stress [--restores N] [--size MIB] [--suite NAME]
[--unprotected | --ignore-clean | --dumps N]``
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ovr
from ovr import lab
from ovr.errors import OvrError
from ovr.lab import demo
from ovr.lab.cache import cache_directory
from ovr.lab.image import SUITES
from tests import subject
from tests.stress.copier import Races, counting, ignoring_clean, unprotected
from tests.stress.dumps import dump_under_stress
from tests.stress.guest import Noise, trouble

MIB = 1 << 20
CANARIES = 3
PAUSE = 0.1


@dataclass
class Outcome:
    """The result of a run.

    Attributes:
        passed: restores after which everything was right.
        failed: the others, each with what was wrong.
        races: what the copier met.
        counters: what the guest's kernel did meanwhile.
    """

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    races: Races = field(default_factory=Races)
    counters: dict[str, int] = field(default_factory=dict)


class Stress:
    """A VM under stress, and a dump to restore into it.

    Args:
        vm: the VM, with two NUMA nodes.
        images: the dump.
        canary_mib: what each canary holds.
        verify: how much `ovr` compares itself.
    """

    def __init__(
        self, vm: lab.LabVm, images: subject.Images, canary_mib: int, verify: str = "full"
    ) -> None:
        self.vm = vm
        self.images = images
        self.verify = verify
        self.noise = Noise(vm, CANARIES, canary_mib)
        subject.install(vm)
        self.noise.start()
        self.wrong = 0  # canary pages, as known so far

    def restore(self) -> None:
        """Restore once; raises what is wrong."""
        with ovr.attach(f"lab:{self.vm.name}") as attached:
            attached.restore(self.images.path, verify=self.verify)
        self.noise.reclaim()
        answer = subject.ask(self.vm)
        assert answer.pages == subject.pages(self.images.size), answer
        assert answer.wrong == 0, answer
        assert subject.marks(subject.look(self.vm)) == subject.MARKS
        self.check_canaries()

    def check_canaries(self) -> None:
        """Raise if a canary has found damage since the last look."""
        wrong = self.noise.canaries().wrong
        new, self.wrong = wrong - self.wrong, wrong
        assert not new, f"{new} pages of canaries are damaged"
        said = trouble(self.vm)
        assert not said, f"the guest's kernel says: {said}"

    def finish(self) -> None:
        """Have every canary check all of its memory once more."""
        before = seen = self.noise.canaries().passes
        deadline = time.monotonic() + subject.PATIENCE
        while any(now < then + 2 for now, then in zip(seen, before, strict=True)):
            assert time.monotonic() < deadline, "no canary comes to an end"
            time.sleep(0.5)
            now = self.noise.canaries().passes
            if now != seen:  # a loaded machine takes long, but gets on
                deadline = time.monotonic() + subject.PATIENCE
            seen = now
        self.check_canaries()


def run(
    stress: Stress, restores: int, protection: AbstractContextManager[None], outcome: Outcome
) -> None:
    """Restore so many times, or until the guest is dead."""
    with protection:
        for number in range(1, restores + 1):
            started = time.monotonic()
            try:
                stress.restore()
                outcome.passed += 1
                verdict = "passed"
            except (OvrError, AssertionError) as error:
                verdict = f"FAILED  {error}"
                outcome.failed.append(str(error))
            took = time.monotonic() - started
            print(f"{number:4}  {took:5.1f} s  {verdict}  (pages so far: {outcome.races})")
            sys.stdout.flush()
            try:
                subject.end(stress.vm)
            except (OvrError, AssertionError) as error:
                # Damage may be to the guest's kernel or the agent, and nothing answers any more.
                outcome.failed.append(f"the guest died: {error}")
                return
    try:
        stress.finish()
        outcome.counters = stress.noise.counters()
    except (OvrError, AssertionError) as error:
        outcome.failed.append(str(error))


def memory_of(size: int) -> tuple[str, int]:
    """RAM of the VM for a tree of `size` bytes, and MiB for each canary, which fill the rest."""
    room = size // MIB + 640
    memory = -(-(size // MIB * 2 + 1024) // 64) * 64
    return f"{memory}M", max((memory - room) // CANARIES // 4 * 4, 16)


@contextmanager
def protection_of(asked: argparse.Namespace, races: Races) -> Iterator[None]:
    """Have restores do with the protection, or without a part of it."""
    with ExitStack() as stack:
        stack.enter_context((unprotected if asked.unprotected else counting)(races, PAUSE))
        if asked.ignore_clean:
            stack.enter_context(ignoring_clean())
        yield


def perform(name: str, scratch: Path, asked: argparse.Namespace) -> Outcome:
    """Dump in one VM, restore into another."""
    size = asked.size * MIB
    memory, canary_mib = memory_of(size)
    images = subject.dump_in_a_vm(
        f"{name}-a", scratch, size, "mergeable", suite=asked.suite, memory=f"{asked.size + 768}M"
    )
    outcome = Outcome()
    protection = protection_of(asked, outcome.races)
    with demo.lab_vm(f"{name}-b", suite=asked.suite, memory=memory, numa=2) as vm:
        # Without protection the tree itself shall find the damage, not we before it runs.
        stress = Stress(vm, images, canary_mib, "none" if asked.unprotected else "full")
        run(stress, asked.restores, protection, outcome)
        if not vm.alive:
            print(vm.console.read_text(errors="replace")[-2000:])
    return outcome


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("--restores", type=int, default=10)
    parser.add_argument("--size", type=int, default=512, metavar="MIB", help="of the process")
    parser.add_argument("--suite", choices=SUITES, default="trixie")
    less = parser.add_mutually_exclusive_group()
    less.add_argument(
        "--ignore-clean", action="store_true",
        help="write to clean pages that have a copy in swap, too; passes if words are lost",
    )  # fmt: skip
    less.add_argument(
        "--unprotected", action="store_true",
        help="write without holds and without asking whose a page is; passes if that does damage",
    )  # fmt: skip
    less.add_argument(
        "--dumps", type=int, metavar="N",
        help="dump a process that changes its memory all the time, instead",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main() -> int:
    asked = parse()
    with tempfile.TemporaryDirectory(prefix="ovr-stress-", dir=cache_directory()) as scratch:
        name = f"stress-{os.getpid()}"
        if asked.dumps:
            wrong = dump_under_stress(name, asked.suite, Path(scratch), asked.dumps)
            print(f"{max(asked.dumps - len(wrong), 0)} passed, {len(wrong)} failed")
            return int(bool(wrong))
        outcome = perform(name, Path(scratch), asked)
    for what, count in outcome.counters.items():
        print(f"{count:12,}  {what}")
    print(f"pages met: {outcome.races}")
    for failure in outcome.failed:
        print(f"failed: {failure}")
    if asked.unprotected:
        print(f"without protection: {len(outcome.failed)} of {asked.restores} went wrong")
        shown = bool(outcome.failed or outcome.races.moved)
        print(f"{int(shown)} passed, {int(not shown)} failed")
        return int(not shown)
    if asked.ignore_clean:
        print(f"written to clean pages: {len(outcome.failed)} of {asked.restores} went wrong")
        print(f"{int(bool(outcome.failed))} passed, {int(not outcome.failed)} failed")
        return int(not outcome.failed)
    print(f"{outcome.passed} passed, {len(outcome.failed)} failed")
    return int(bool(outcome.failed) or outcome.passed < asked.restores)


if __name__ == "__main__":
    sys.exit(main())
