"""Kill each process that takes part in a restore, dump or move, at every point of it.

``python -m tests.kill [--dump|--move] [--points N] [--victims NAME,…] [--suite NAME]``
"""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ovr import lab
from ovr.errors import OvrError
from ovr.lab.cache import cache_directory
from ovr.lab.image import SUITES
from tests import subject
from tests.kill import check
from tests.kill.attempt import DUMP, MOVE, RESTORE, Story, perform, points
from tests.kill.dumping import DumpRange
from tests.kill.moving import MoveRange
from tests.kill.place import Place
from tests.kill.steps import Point

MIB = 1 << 20
MEMORY = "512M"


@dataclass
class Outcome:
    """Results of the points so far."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)


class Range(Place):
    """Images, and a VM in which they are restored.

    Args:
        boot: boots a VM.
        images: the dump.
        scratch: a directory for this run.
    """

    story = RESTORE

    def __init__(
        self, boot: Callable[[], lab.LabVm], images: subject.Images, scratch: Path
    ) -> None:
        super().__init__([boot], scratch)
        self.images = images
        self._checksums = images.checksums()

    def command(self) -> list[str]:
        vm = self.vm
        subject.end(vm)
        return ["tests.kill.restorer", f"lab:{vm.name}", str(self.images.path)]

    def shoot(self, victim: str, point: Point) -> str:
        became = self.hit(victim, point)
        check.next_restore(self.vm, self.images)
        return became

    def hit(self, victim: str, point: Point) -> str:
        """Kill the victim at that point of a restore; returns what became of the tree."""
        vm = self.vm
        attempt, met = perform([vm], self.command(), victim, point, self.temporary)
        try:
            became = check.after(vm, victim, attempt, self.temporary)
        finally:
            attempt.close()
        assert self.images.checksums() == self._checksums, "the images have changed"
        assert vm.alive or victim == "qemu", "the VM is dead"
        return became if met else f"{became}; nobody to kill"


def sweep(place: Place, victim: str, count: int, outcome: Outcome) -> None:
    """Kill the victim at so many points."""
    for point in points(place.events, victim, count, place.story):
        started = time.monotonic()
        try:
            verdict = f"passed  {place.shoot(victim, point)}"
            outcome.passed += 1
        except (OvrError, AssertionError) as error:
            verdict = "; ".join([f"FAILED  {error}", *place.trouble()])
            outcome.failed.append(f"{victim} {point}: {error}")
            traceback.print_exc()
            place.down()  # what is left in it must not spoil the next
        took = time.monotonic() - started
        print(f"{victim:7}  {point!s:54} {took:5.1f} s  {verdict}")
        sys.stdout.flush()


@contextmanager
def shooting_range(name: str, suite: str, scratch: Path) -> Iterator[Range]:
    """Dump in one VM; the body of the ``with`` restores into others."""
    directory = scratch / "images"
    directory.mkdir()
    images = subject.dump_in_a_vm(f"{name}-a", directory, 8 * MIB, suite=suite, memory=MEMORY)
    place = Range(lambda: lab.up(f"{name}-b", suite=suite, memory=MEMORY), images, scratch)
    try:
        yield place
    finally:
        place.down()


@contextmanager
def dumping_range(name: str, suite: str, scratch: Path, rounds: int = 0) -> Iterator[DumpRange]:
    """Make a range for dumps."""
    share = scratch / "share"
    share.mkdir()
    place = DumpRange(
        lambda: lab.up(name, suite=suite, memory=MEMORY, share=share), share, scratch,
        rounds,
    )  # fmt: skip
    try:
        yield place
    finally:
        place.down()


@contextmanager
def moving_range(name: str, suite: str, scratch: Path) -> Iterator[MoveRange]:
    """Make a range for moves."""
    boots = [partial(lab.up, f"{name}-{side}", suite=suite, memory=MEMORY) for side in "ab"]
    place = MoveRange(boots, scratch)
    try:
        yield place
    finally:
        place.down()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dump", dest="story", action="store_const", const=DUMP, help="instead of a restore"
    )
    what.add_argument("--move", dest="story", action="store_const", const=MOVE, help="likewise")
    parser.set_defaults(story=RESTORE)
    parser.add_argument(
        "--pre-copy", type=int, default=0, metavar="N", help="dump with so many rounds of copies"
    )
    parser.add_argument("--points", type=int, default=10, help="of each victim")
    parser.add_argument(
        "--victims", metavar="NAME,…", help=f"some of {_names(RESTORE)}; of a move {_names(MOVE)}"
    )
    parser.add_argument("--suite", choices=SUITES, default="trixie")
    asked = parser.parse_args(arguments)
    there = asked.story.victims
    asked.victims = asked.victims.split(",") if asked.victims else there
    if unknown := {*asked.victims} - {*there}:
        parser.error(f"no such victim: {', '.join(sorted(unknown))}")
    return asked


def _names(story: Story) -> str:
    return ",".join(story.victims)


def main() -> int:
    asked = parse()
    outcome = Outcome()
    make: Callable[..., AbstractContextManager[Place]]
    if asked.story is DUMP:
        make = partial(dumping_range, rounds=asked.pre_copy)
    else:
        make = moving_range if asked.story is MOVE else shooting_range
    with (
        tempfile.TemporaryDirectory(prefix="ovr-kill-", dir=cache_directory()) as scratch,
        make(f"kill-{os.getpid()}", asked.suite, Path(scratch)) as place,
    ):
        for victim in asked.victims:
            sweep(place, victim, asked.points, outcome)
    for line in outcome.failed:
        print(line)
    print(f"{outcome.passed} passed, {len(outcome.failed)} failed")
    return int(bool(outcome.failed))


if __name__ == "__main__":
    sys.exit(main())
