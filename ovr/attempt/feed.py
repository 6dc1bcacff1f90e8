"""Pages read ahead of a hold, in which nothing may wait for a disk."""

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

    They are in the page cache, from where they can be read without waiting; where the file system
    does not support that, or the host drops them from its cache, they are in a buffer of ours.

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
        """Read pages ahead of a hold.

        Args:
            source: the image.
            part: pieces; offsets are positions in it.
            aside: read into a buffer in any case.

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
        """Copy pages to the frames in `runs`; the caller states why they stay there.

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
        """Compare pages with the frames in `runs`.

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
