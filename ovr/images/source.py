"""Open pages images, map them into this process and read them ahead."""

import errno
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Self

from ovr._fastcopy import CUT_OFF, in_page_cache
from ovr.errors import ImagesDamaged
from ovr.images.task import Memory
from ovr.images.unreadable import unreadable
from ovr.memory.addresses import PAGE_SIZE

__all__ = ["Source", "Sources", "readable"]

_ELSEWHERE: Final = "dump again, or copy the images to a directory that no other program writes to"
_GRAIN: Final = 256 << 10
_ASK_AT_ONCE: Final = 16 << 20


@dataclass(frozen=True)
class Source:
    """A pages image.

    Attributes:
        name: its name in messages.
        pages: its content, mapped; read it within `readable`, because it may be truncated.
        fd: descriptor of the file that contains it.
        base: its offset in that file, in bytes.
        nowait: whether the file system supports reads that do not wait (``RWF_NOWAIT``).
    """

    name: str
    pages: memoryview
    fd: int
    base: int
    nowait: bool = False

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return len(self.pages)

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` from the offset `start`.

        Raises:
            ImagesDamaged: it cannot be read.
        """
        done = 0
        with readable(self.name):
            while done < len(buffer):
                got = os.preadv(self.fd, [buffer[done:]], self.base + start + done)
                if not got:
                    raise OSError(errno.EIO, CUT_OFF)
                done += got

    def read_ahead(self, start: int, end: int) -> None:
        """Read the range from `start` to `end` into the host's page cache.

        Raises:
            ImagesDamaged: it cannot be read.
        """
        absent = list(_absent(self.fd, self.base + start, self.base + end))
        if not absent:
            return
        buffer = bytearray(_GRAIN)
        with readable(self.name):
            for at, until in absent:
                os.posix_fadvise(self.fd, at, until - at, os.POSIX_FADV_WILLNEED)
            for at, until in absent:
                _read_through(self.fd, at, until, buffer)


class Sources:
    """The pages images of an image set, each opened once and closed when the ``with`` ends."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._opened: dict[tuple[str, int], Source] = {}
        self._as_opened: dict[tuple[str, int], tuple[Memory, tuple[int, ...]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.clear()
        self._stack.close()

    def of(self, memory: Memory, level: int) -> Source:
        """Return the pages image of `memory` at `level` of the chain of dumps.

        Raises:
            ImagesDamaged: it became shorter.
        """
        key = memory.name, level
        if key not in self._opened:
            file = memory.file(level)
            # Within an archive an image may begin at any multiple of 512.
            start = file.base // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            size = file.base - start + file.size
            fd = file.open()
            self._stack.callback(os.close, fd)
            self._as_opened[key] = memory, _mark(fd)
            pages = mmap.mmap(fd, size, access=mmap.ACCESS_READ, offset=start)
            self._stack.enter_context(pages)
            whole = memoryview(pages)
            self._stack.callback(whole.release)
            view = whole[file.base - start :]
            self._stack.callback(view.release)
            self._opened[key] = Source(
                memory.pages_name, view, fd, file.base, _without_waiting(fd, file.base)
            )
        return self._opened[key]

    def read_ahead(self, wanted: Iterable[tuple[Memory, int]]) -> None:
        """Start to read images into the host's page cache; return at once.

        At most half of the available memory is used; the rest is read when it is needed.

        Raises:
            ImagesDamaged: as `of`.
        """
        sources = [self.of(*one) for one in wanted]
        stop = threading.Event()
        thread = threading.Thread(target=_ask_for, args=(sources, stop), daemon=True)

        def end() -> None:
            stop.set()
            if thread.is_alive():
                thread.join()

        self._stack.callback(end)  # registered before `start`, which a signal may interrupt
        thread.start()

    def check_unchanged(self) -> None:
        """Check that the files have not been written to since they were opened.

        Raises:
            ImagesDamaged: one has changed, so the data read may be old or new.
        """
        for (_, level), (memory, mark) in self._as_opened.items():
            fd = memory.file(level).open()
            try:
                same = _mark(fd) == mark
            finally:
                os.close(fd)
            if not same:
                raise ImagesDamaged(
                    f"{memory.pages_name}: changed while it was restored", _ELSEWHERE
                )


def _absent(fd: int, at: int, end: int) -> Iterator[tuple[int, int]]:
    # Parts of a file range that are not in the page cache, `_GRAIN` bytes at most each. Memory
    # pressure evicts scattered pages of an image; to read all of it for them would take as long as
    # the copy.
    if in_page_cache(fd, at, end - at):
        return
    if end - at <= _GRAIN:
        yield at, end
        return
    middle = at + (end - at) // 2 // PAGE_SIZE * PAGE_SIZE
    yield from _absent(fd, at, middle)
    yield from _absent(fd, middle, end)


def _without_waiting(fd: int, at: int) -> bool:
    # EAGAIN only means that the byte is not in the page cache.
    try:
        os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError as error:
        # tmpfs, NFS, FUSE and overlays of some kernels. A later read reports other errors.
        return error.errno != errno.EOPNOTSUPP
    return True


def _read_through(fd: int, at: int, end: int, buffer: bytearray) -> None:
    while at < end:
        got = os.preadv(fd, [memoryview(buffer)[: end - at]], at)
        if not got:
            raise OSError(errno.EIO, CUT_OFF)
        at += got


def _ask_for(sources: Sequence[Source], stop: threading.Event) -> None:
    import psutil  # noqa: PLC0415 - loaded in a thread, off the critical path

    room = psutil.virtual_memory().available // 2
    windows = (
        (source, at)
        for source in sources
        for at in range(source.base, source.base + source.size, _ASK_AT_ONCE)
    )
    # Errors are reported by the reader, not here. The images may also be closed by now.
    with suppress(OSError, ValueError):
        for source, at in windows:
            size = min(_ASK_AT_ONCE, source.base + source.size - at)
            if stop.is_set() or room < size:
                return
            if not in_page_cache(source.fd, at, size):
                room -= size
                os.posix_fadvise(source.fd, at, size, os.POSIX_FADV_WILLNEED)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn errors of reading a pages image in the body of the ``with`` into ours.

    Raises:
        ImagesDamaged: the native loops found that it was truncated.
        ImagesForbidden, ImagesUnreachable: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        cut_off = (errno.EIO,) if error.strerror == CUT_OFF else ()
        raise unreadable(name, error, damaged=cut_off, cure=_ELSEWHERE) from error


def _mark(fd: int) -> tuple[int, ...]:
    # Changes when the file is written to or replaced.
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
