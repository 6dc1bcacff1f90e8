"""The directory that a dump writes its images to."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from ovr.attempt.sink import Sink
from ovr.errors import ImagesDamaged, UsageError
from ovr.host import UntrustedPath, cure_of, locate
from ovr.host.closing import Closing

__all__ = ["Output", "writable"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_LAST: Final = "inventory.img"
_MAX_LAST: Final = 1 << 20
_MAX_FILES: Final = 1 << 20
_MODE: Final = 0o600  # CR_FD_PERM of criu/include/image.h
_ELSEWHERE: Final = "dump into another directory"


class Output(Closing):
    """New images in an existing directory; a context manager.

    Unless it is told to `keep` them, they are removed when it is closed. The inventory, without
    which they are no image set, is written by `complete`.

    Args:
        path: the directory.

    Raises:
        UsageError: it does not exist, has images already, or cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: set[str] = set()
        self._open: dict[str, IO[bytes]] = {}
        self._last = b""
        self._kept = False
        with writable(path):
            if not path.is_dir():
                raise UsageError(f"{path} is not a directory", "create it, or name another with -D")
            self._directory, _ = locate(path / _LAST)
        try:
            with writable(path):
                names = self._directory.names()
            if any(name.endswith(".img") for name in names):
                raise UsageError(f"{path} has images already", "dump into an empty directory")
        except BaseException:
            self._directory.close()
            raise

    def save(self, name: str, data: bytes) -> None:
        """Append to the image `name`, which the guest named; an empty piece ends it.

        Raises:
            ImagesDamaged: it is no name of an image, or the image has ended.
            UsageError: the file cannot be written.
        """
        if name == _LAST and len(self._last) + len(data) <= _MAX_LAST:
            self._last += data
            return
        file = self._open.get(name)
        if file is None:
            if not _NAME.fullmatch(name) or name in self._made or len(self._made) == _MAX_FILES:
                raise ImagesDamaged(
                    f"the agent sent an image with the name {name[:80]!r}",
                    "is this agent the guest's own, and unchanged?",
                )
            file = self._open[name] = os.fdopen(self._create(name), "wb")
        with writable(self.path / name):
            file.write(data)
            if not data:
                self._open.pop(name).close()

    def names(self) -> list[str]:
        """Return the names of all images but the inventory."""
        return sorted(self._made)

    def read(self, name: str) -> bytes:
        """Return the content of an image."""
        return self._path_of(name).read_bytes()

    def replace(self, name: str, data: bytes) -> None:
        """Replace an image's content."""
        self._remove(name)
        with writable(self.path / name), os.fdopen(self._create(name), "wb") as file:
            file.write(data)

    def take(self, name: str) -> int:
        """Return a descriptor of an image that is removed from the directory."""
        fd = os.open(self._path_of(name), os.O_RDONLY | os.O_CLOEXEC)
        self._remove(name)
        return fd

    def sink(self, name: str, size: int) -> Sink:
        """Return a new pages image of `size` bytes.

        Raises:
            UsageError: there is no space for it.
        """
        fd = self._create(name)
        try:
            with writable(self.path / name):
                both = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
                return Sink(both, name, size)
        finally:
            os.close(fd)

    def complete(self) -> None:
        """Write the inventory: all images are complete.

        Raises:
            ImagesDamaged: CRIU has written none.
            UsageError: the file cannot be written.
        """
        if not self._last or self._open:
            raise ImagesDamaged(
                "the agent has not sent all images",
                "is this agent the guest's own, and unchanged?",
            )
        with writable(self.path / _LAST), os.fdopen(self._create(_LAST), "wb") as file:
            file.write(self._last)

    def keep(self) -> None:
        """Let the images stay."""
        self._kept = True

    def close(self) -> None:
        """Close all files; remove the images unless they are to stay."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        if not self._kept:
            for name in list(self._made):
                self._remove(name)
        self._directory.close()

    def _create(self, name: str) -> int:
        with writable(self.path / name):
            fd = self._directory.create(name, _MODE)
        self._made.add(name)
        return fd

    def _remove(self, name: str) -> None:
        self._directory.remove(name)
        self._made.discard(name)

    def _path_of(self, name: str) -> Path:
        return Path(f"/proc/self/fd/{self._directory.fileno()}") / name


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn errors of writing `path` in the body of the ``with`` into ours.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        hint = (
            "dump into a directory of your own"
            if isinstance(error, UntrustedPath)
            else cure_of(error, _ELSEWHERE)
        )
        raise UsageError(f"{path} cannot be written: {reason}", hint) from error
