"""Places where kernels were found before: a hint that saves the search through a guest's RAM.

A search has to see all RAM, since a reboot leaves the dead kernel behind, often complete. The two
differ in their clocks: a dead kernel's stands still. So each place is stored with the offset of the
guest's clock to the host's. A kernel at a known place runs if its clock has kept that offset. In
doubt (the guest was paused, its clock was set) all RAM is searched again.
"""

import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from ovr.kernel.cache import opened
from ovr.memory.addresses import PAGE_SIZE, Gpa

__all__ = ["Place", "note", "recall"]

FILE: Final = "places"
KEPT: Final = 16
MAX_SIZE: Final = 4096
TOLERANCE: Final = 1.5
"""Seconds: the guest's clock is read in whole ones, and idle guests are late to update it."""

log = logging.getLogger("ovr.kernel.find.places")


@dataclass(frozen=True)
class Place:
    """The place of a VMCOREINFO; `ahead`: seconds by which its kernel's clock was ahead of ours."""

    gpa: Gpa
    ahead: float

    @classmethod
    def now(cls, gpa: Gpa, wall_clock: int) -> "Place":
        """Return the place with the present offset of the kernel's clock."""
        return cls(gpa, wall_clock - time.time())

    def runs(self, wall_clock: int) -> bool:
        """Tell whether a kernel whose clock shows this time has been running since."""
        return abs(wall_clock - time.time() - self.ahead) <= TOLERANCE


def recall() -> list[Place]:
    """Return the stored places, the latest first."""
    directory = opened(create=False)
    if directory is None:
        return []
    with directory:
        try:
            lines = directory.read(FILE, MAX_SIZE).decode("ascii").splitlines()
            return [_parse(line) for line in lines[:KEPT]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            log.info("the places of kernels are not known: %s", error)
            return []


def note(place: Place) -> None:
    """Store a place, as the latest one."""
    others = [old for old in recall() if old.gpa != place.gpa]
    text = "".join(f"{one.gpa:x} {one.ahead:.3f}\n" for one in [place, *others][:KEPT])
    if (directory := opened(create=True)) is None:
        return
    with directory, suppress(OSError), directory.replacement(FILE, 0o600) as fresh:
        fresh.file.write(text.encode())
        fresh.put()


def _parse(line: str) -> Place:
    gpa, ahead = line.split()
    place = Place(Gpa(int(gpa, 16)), float(ahead))
    if place.gpa % PAGE_SIZE or not 0 <= place.gpa < 1 << 52 or not math.isfinite(place.ahead):
        raise ValueError(f"{line!r} is no place")
    return place
