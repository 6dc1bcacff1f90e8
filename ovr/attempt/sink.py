"""Pages images that are written to from holds, in which nothing may block.

Pages of zeros are written like all others, and become holes of the file later: to make one may take
a disk longer than to write the page, and the tree need not wait for it.
"""

import logging
import mmap
import os
from contextlib import suppress
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from ovr._fastcopy import is_in_memory, punch_hole
from ovr.host.closing import Closing
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.extents import Extents, ends_of, file_ranges, pages_in, total

__all__ = ["Buffers", "Drain", "Sink"]

log = logging.getLogger("ovr.dump")

_MADV_POPULATE_WRITE: Final = 23  # since v5.14
_LEAST_HOLE: Final = 64 << 10
"""Least size of a hole on a disk: each is a change of the file system's own data."""


class Sink(Closing):
    """A new pages image.

    Args:
        fd: descriptor of the empty file, open for reading and writing, which this object owns.
        name: its name in messages.
        size: its size when it is complete, in bytes.

    Attributes:
        nowait: whether the file is in memory (tmpfs), so that pages can be copied to it in a hold.
        pages: then its content, mapped.
        zero: for each of its pages, whether it is known to have zeros only.

    Raises:
        OSError: there is no space for it.
    """

    def __init__(self, fd: int, name: str, size: int) -> None:
        self.fd = fd
        self.name = name
        self.size = size
        os.ftruncate(fd, size)
        self.nowait = size > 0 and is_in_memory(fd)
        self.pages = mmap.mmap(fd, size) if self.nowait else None
        self.zero = np.zeros(size // PAGE_SIZE, np.bool_)

    def allocate(self) -> None:
        """Allocate the whole file.

        Raises:
            OSError: there is no space for it.
        """
        if self.pages is not None:
            self.pages.madvise(_MADV_POPULATE_WRITE)
        elif self.size:
            os.posix_fallocate(self.fd, 0, self.size)

    def resize(self, size: int) -> None:
        """Set the size that it has when it is complete.

        Raises:
            OSError: there is no space for it.
        """
        if self.pages is not None and size:
            self.pages.resize(size)  # of the file, too
        else:
            os.ftruncate(self.fd, size)
        self.size = size
        self.zero = np.zeros(size // PAGE_SIZE, np.bool_)

    def make_holes(self) -> None:
        """Give back the space of pages of zeros, when they have been written.

        A file system that does not do that keeps them, which is logged.
        """
        edges = np.flatnonzero(np.diff(self.zero, prepend=False, append=False)) * PAGE_SIZE
        least = PAGE_SIZE if self.nowait else _LEAST_HOLE
        try:
            for start, end in edges.reshape(-1, 2).tolist():
                if end - start >= least:
                    punch_hole(self.fd, start, end - start)
        except OSError as error:
            log.info("%s: no holes for pages of zeros: %s", self.name, error.strerror)

    def close(self) -> None:
        """Close the file."""
        if self.pages is not None:
            with suppress(BufferError):  # an error's traceback still has a view
                self.pages.close()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Buffers:
    """Buffers that are used again, so that the host need not allocate memory in each hold."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []

    def take(self, size: int) -> memoryview:
        """Return a buffer of at least `size` bytes, all of them in memory."""
        # Atomic without a lock: several threads take buffers.
        for _ in range(len(self._free)):
            with suppress(IndexError):
                buffer = self._free.pop()
                if len(buffer) >= size:
                    return buffer
        made = np.empty(size, dtype=np.uint8)
        made[::PAGE_SIZE] = 0
        return made.data

    def give(self, buffer: memoryview) -> None:
        """Take back a buffer."""
        self._free.append(buffer)


class Drain:
    """Some pages that are to be copied to a sink: directly, or by way of a buffer.

    Attributes:
        sink: the image.
        part: the pages, a `_fastcopy.PIECE` array; offsets are positions in `buffer`.
        buffer: the mapped image, or one of our own.
        zero: for each page that is copied, in their order, whether it has zeros only.
    """

    def __init__(self, sink: Sink, placed: Extents, part: Extents, buffer: memoryview) -> None:
        self.sink = sink
        self._placed = placed
        self.part = part
        self.buffer = buffer
        self.zero = np.zeros(total(part) // PAGE_SIZE, np.uint8)

    @classmethod
    def make(cls, sink: Sink, part: Extents, buffers: Buffers) -> Self:
        """Allocate the memory, with the VM running.

        Args:
            sink: the image.
            part: pieces; offsets are positions in it.
            buffers: has the buffer, until `flush`.

        Raises:
            OSError: the file system is full.
        """
        if sink.pages is not None:
            for start, end in file_ranges(part):
                sink.pages.madvise(_MADV_POPULATE_WRITE, start, end - start)
            return cls(sink, part, part, memoryview(sink.pages))
        buffer = buffers.take(total(part))
        within = part.copy()
        within["offset"] = np.cumsum(part["size"]) - part["size"]
        return cls(sink, part, within, buffer)

    def flush(self, done: Extents, buffers: Buffers) -> None:
        """Write the runs that were copied to the buffer to the file, and give the buffer back.

        Args:
            done: the runs, in the order in which they were copied.
            buffers: gets the buffer.

        Raises:
            OSError: the file system is full, or fails.
        """
        at = np.searchsorted(ends_of(self._placed), done["gva"], side="right")
        target = done["offset"] + self._placed["offset"][at] - self.part["offset"][at]
        self._note_zero(target, pages_in(done))
        if self.sink.pages is not None:
            return
        for start, size, place in zip(
            done["offset"].tolist(), done["size"].tolist(), target.tolist(), strict=True
        ):
            _write(self.sink.fd, self.buffer[start : start + size], place)
        buffers.give(self.buffer)

    def _note_zero(self, target: NDArray[np.int64], pages: NDArray[np.int64]) -> None:
        zero = np.flatnonzero(self.zero[: pages.sum()])
        if len(zero):
            ends = np.cumsum(pages)
            run = np.searchsorted(ends, zero, side="right")
            self.sink.zero[target[run] // PAGE_SIZE + zero - (ends - pages)[run]] = True


def _write(fd: int, data: memoryview, at: int) -> None:
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done
