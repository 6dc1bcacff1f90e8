"""What is read ahead of a hold, so that nothing in it waits for a disk."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from ovr.images.source import Source, readable
from ovr.memory.addresses import Gva
from ovr.memory.extents import Extents, file_ranges, total
from ovr.memory.ram import GuestRam

__all__ = ["Feed"]


@dataclass(frozen=True)
class Feed:
    """Some pages of an image, ready to be copied or compared.

    They are in the page cache, from where they are read without waiting; where the file system
    cannot do that, or the host does not keep them there, they are in memory of our own.

    Attributes:
        source: the image.
        part: the pages, a `_fastcopy.PIECE` array; offsets are positions in `source`, or `aside`.
        aside: their content, in the order of `part`; None if it is in the page cache.
    """

    source: Source
    part: Extents
    aside: memoryview | None = None

    @classmethod
    def make(cls, source: Source, part: Extents, *, aside: bool = False) -> Self:
        """Read pages ahead.

        Args:
            source: the image.
            part: pieces; offsets are positions in it.
            aside: into memory of our own in any case.

        Raises:
            ImagesDamaged: it cannot be read.
        """
        if source.nowait and not aside:
            for start, end in file_ranges(part):
                source.read_ahead(start, end)
            return cls(source, part)
        buffer = np.empty(total(part), dtype=np.uint8).data
        done = 0
        for start, end in file_ranges(part):
            source.read_into(buffer[done : done + end - start], start)
            done += end - start
        placed = part.copy()
        placed["offset"] = np.cumsum(part["size"]) - part["size"]
        return cls(source, placed, buffer)

    def copy(self, ram: GuestRam, runs: Extents) -> int:
        """Copy to where `runs` of the pages are; who calls this states why they stay there.

        Returns the number of bytes copied, in the order of the runs: fewer than all if the hold is
        to end, or the host has dropped pages from its cache.

        Raises:
            ImagesDamaged: the image cannot be read.
            HoldBroken: the VM is not held any more.
        """
        if self.aside is not None:
            return ram.copy_from(runs, self.aside)
        source = self.source
        with readable(source.name):
            return ram.copy_in(runs, source.fd, source.base, source.size, wait=False)

    def compare(self, ram: GuestRam, runs: Extents) -> tuple[int, Gva | None]:
        """Compare with what is where `runs` of the pages are.

        Returns the number of bytes that are equal, counted as `copy` does, and the address of the
        first page that differs, or None.

        Raises:
            ImagesDamaged: the image cannot be read.
        """
        if self.aside is not None:
            return total(runs), ram.first_difference(runs, self.aside)
        source = self.source
        with readable(source.name):
            return ram.review(runs, source.fd, source.base, source.size, wait=False)
