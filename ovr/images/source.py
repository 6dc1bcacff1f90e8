"""Pages images, mapped into this process."""

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, Self

from ovr.errors import ImagesDamaged
from ovr.images.task import Memory

__all__ = ["Sources", "readable"]

_ELSEWHERE: Final = "dump again, or copy the images to where nobody changes them"


class Sources:
    """The pages images of an image set, each mapped once, until the ``with`` ends."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._mapped: dict[tuple[str, int], memoryview] = {}
        self._as_mapped: dict[tuple[str, int], tuple[Memory, tuple[int, ...]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._mapped.clear()
        self._stack.close()

    def of(self, memory: Memory, level: int) -> memoryview:
        """Return the pages image of `memory` at `level` of the chain of dumps, read-only.

        Who reads it does so within `readable`: somebody may cut it off.

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
                self._as_mapped[key] = memory, _mark(fd)
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

    def check_unchanged(self) -> None:
        """Make sure that nobody has written to the files since they were mapped.

        Raises:
            ImagesDamaged: somebody has; what was read may be of before or of after.
        """
        for (_, level), (memory, mark) in self._as_mapped.items():
            fd = memory.file(level).open()
            try:
                same = _mark(fd) == mark
            finally:
                os.close(fd)
            if not same:
                raise ImagesDamaged(
                    f"{memory.pages_name}: changed while it was restored", _ELSEWHERE
                )


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Read a pages image in the body of the ``with``.

    Raises:
        ImagesDamaged: the native loops found that it cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise ImagesDamaged(f"{name}: cannot be read: {error.strerror}", _ELSEWHERE) from error


def _mark(fd: int) -> tuple[int, ...]:
    # What is another one when the file was written to, or replaced.
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
