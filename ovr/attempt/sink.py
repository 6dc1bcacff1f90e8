"""Pages images that are written to from holds, in which nothing may block."""

import mmap
import os
from contextlib import suppress
from typing import Final, Self

import numpy as np

from ovr._fastcopy import is_in_memory
from ovr.host.closing import Closing
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.extents import Extents, ends_of, file_ranges, total

__all__ = ["Buffers", "Drain", "Sink"]

_MADV_POPULATE_WRITE: Final = 23  # since v5.14


class Sink(Closing):
    """A new pages image.

    Args:
        fd: descriptor of the empty file, open for reading and writing, which this object owns.
        name: its name in messages.
        size: its size when it is complete, in bytes.

    Attributes:
        nowait: whether the file is in memory (tmpfs), so that pages can be copied to it in a hold.
        pages: then its content, mapped.

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
    """

    def __init__(self, sink: Sink, placed: Extents, part: Extents, buffer: memoryview) -> None:
        self.sink = sink
        self._placed = placed
        self.part = part
        self.buffer = buffer

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

        Raises:
            OSError: the file system is full, or fails.
        """
        if self.sink.pages is not None:
            return
        at = np.searchsorted(ends_of(self._placed), done["gva"], side="right")
        delta = self._placed["offset"][at] - self.part["offset"][at]
        for start, size, target in zip(
            done["offset"].tolist(), done["size"].tolist(), (done["offset"] + delta).tolist(),
            strict=True,
        ):  # fmt: skip
            _write(self.sink.fd, self.buffer[start : start + size], target)
        buffers.give(self.buffer)


def _write(fd: int, data: memoryview, at: int) -> None:
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done
