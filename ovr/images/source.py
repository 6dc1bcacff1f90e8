"""Pages images, mapped into this process."""

import mmap
import os
from contextlib import ExitStack
from typing import Self

from ovr.images.task import Memory

__all__ = ["Sources"]


class Sources:
    """The pages images of an image set, each mapped once, until the ``with`` ends."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._mapped: dict[tuple[str, int], memoryview] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._mapped.clear()
        self._stack.close()

    def of(self, memory: Memory, level: int) -> memoryview:
        """Return the pages image of `memory` at `level` of the chain of dumps, read-only.

        Raises:
            ImagesDamaged: it is no longer as long as it was.
        """
        key = memory.name, level
        if key not in self._mapped:
            file = memory.file(level)
            # Within an archive an image begins at any multiple of 512.
            start = file.base // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            size = file.base - start + file.size
            fd = file.open()
            try:
                pages = mmap.mmap(fd, size, access=mmap.ACCESS_READ, offset=start)
            finally:
                os.close(fd)
            self._stack.enter_context(pages)
            whole = memoryview(pages)
            self._stack.callback(whole.release)
            view = whole[file.base - start :]
            self._stack.callback(view.release)
            self._mapped[key] = view
        return self._mapped[key]
