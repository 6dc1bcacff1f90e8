"""The directory that a dump writes its images to."""

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ovr.attempt.sink import Sink
from ovr.errors import ArchiveFailed, AttemptFailed, ImagesDamaged, TreeDamaged, UsageError
from ovr.guest.client.agent import Agent
from ovr.host import Directory, UntrustedPath, cure_of, locate
from ovr.host.closing import Closing
from ovr.images.framing import DUMP_AGAIN

__all__ = [
    "DESCRIPTORS",
    "INVENTORY",
    "PRE_COPY",
    "NewImages",
    "Output",
    "Staging",
    "free_name",
    "runs_on",
    "writable",
]

INVENTORY: Final = "inventory.img"
DESCRIPTORS: Final = "descriptors.json"
"""The file that runc and crun put beside CRIU's images."""
PRE_COPY: Final = "pre-copy-"
"""Subdirectories of the images of pages that were copied while the tree ran, by round."""

_PARENT: Final = "parent"  # CR_PARENT_LINK of criu/include/image.h
_MODE: Final = 0o600
_READABLE: Final = 0o644  # CR_FD_PERM of criu/include/crtools.h
_USER_NAMESPACE: Final = "userns-"
_ELSEWHERE: Final = "dump into another directory"


class NewImages:
    """Images in a new directory of our own.

    Args:
        path: the directory, which exists and which no other user can write to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, name: str, data: bytes) -> None:
        """Append to an image, which may be new.

        Raises:
            UsageError: it cannot be written.
        """
        with writable(self.path / name):
            fd = self._open(name, os.O_APPEND)
            with os.fdopen(fd, "ab") as file:
                file.write(data)

    def write(self, name: str, data: bytes) -> None:
        """Write an image, or replace one.

        Raises:
            UsageError: it cannot be written.
        """
        with writable(self.path / name), os.fdopen(self._open(name, os.O_TRUNC), "wb") as file:
            file.write(data)

    def read(self, name: str, most: int) -> bytes:
        """Return the content of an image.

        Raises:
            ImagesDamaged: it is larger than `most` bytes.
        """
        path = self.path / name
        if path.stat().st_size > most:
            raise ImagesDamaged(f"{name}: more than {most} bytes", DUMP_AGAIN)
        return path.read_bytes()

    def sink(self, name: str, size: int) -> Sink:
        """Return a new pages image of `size` bytes.

        Raises:
            UsageError: there is no space for it.
        """
        with writable(self.path / name):
            fd = self._open(name, os.O_TRUNC)
            try:
                return Sink(fd, name, size)
            except BaseException:
                os.close(fd)
                raise

    def _open(self, name: str, flags: int) -> int:
        flags |= os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self.path / name, flags, _MODE)


class Staging(Closing):
    """New images in a subdirectory with a name of its own, which is removed when this is closed.

    Args:
        directory: gets the subdirectory; this object owns it.

    Attributes:
        images: the images.

    Raises:
        OSError: the subdirectory cannot be made.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._parents = 0
        try:
            self.images = NewImages(self._make(f".ovr-dump-{os.urandom(8).hex()}"))
        except BaseException:
            directory.close()
            raise

    def next_parent(self) -> NewImages:
        """Return images of pages that these images build on, as those of a pre-dump of CRIU.

        They build on those that were returned before.

        Raises:
            UsageError: they cannot be written.
        """
        self._parents += 1
        name = f"{PRE_COPY}{self._parents}"
        link = self.images.path / _PARENT
        with writable(self.images.path):
            (self.images.path / name).mkdir(mode=0o700)
            if self._parents > 1:
                (self.images.path / name / _PARENT).symlink_to(f"../{link.readlink()}")
                link.unlink()
            link.symlink_to(name)
        return NewImages(self.images.path / name)

    def close(self) -> None:
        """Remove what is not in its place."""
        _remove(self.images.path)
        self._directory.close()

    @property
    def base(self) -> Path:
        """The directory, not by name: another one may have that by now."""
        return Path(f"/proc/self/fd/{self._directory.fileno()}")

    def _make(self, name: str) -> Path:
        os.mkdir(name, 0o700, dir_fd=self._directory.fileno())
        return self.base / name


class Output(Staging):
    """New images in an existing directory; a context manager.

    Args:
        path: the directory.

    Raises:
        UsageError: it does not exist, has images already, or cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told = False
        with writable(path):
            if not path.is_dir():
                raise UsageError(f"{path} is not a directory", "create it, or name another with -D")
            directory, _ = locate(path / INVENTORY)
            try:
                if any(_is_image(name) for name in directory.names()):
                    raise UsageError(f"{path} has images already", "dump into an empty directory")
            except BaseException:
                directory.close()
                raise
            super().__init__(directory)

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Move the images to their place, before the body of the ``with`` ends the tree.

        Images of a tree with a user namespace can be read by all, as CRIU's own: to restore them,
        it opens them as the namespace's root, which is another user outside.
        The inventory, without which they are no images, is moved last. If the body fails before it
        calls `end`, or the tree runs on, they are removed. If it is not known, or CRIU may have
        ended a part of the tree, they stay: nothing else may have its memory.

        Raises:
            UsageError: they cannot be moved.
        """
        moved: list[Path] = []
        try:
            with writable(self.path):
                new = sorted(self.images.path.iterdir(), key=lambda path: path.name == INVENTORY)
                if any(path.name.startswith(_USER_NAMESPACE) for path in new):
                    _let_all_read(new)
                for path in new:
                    moved.append(self.base / path.name)
                    path.rename(moved[-1])
            yield
        except BaseException as error:
            if not self._told or runs_on(error):
                for path in reversed(moved):
                    _remove(path)
            elif isinstance(error, TreeDamaged):
                error.hint += f"; its images are complete, in {self.path}"
            elif isinstance(error, ArchiveFailed):
                error.hint = f"the container has ended; its images are complete, in {self.path}"
            raise

    def end(self, agent: Agent) -> bytes:
        """Have CRIU end the dump; return its statistics."""
        self._told = True
        return agent.end_dump()


def runs_on(error: BaseException) -> bool:
    """Tell whether the error of a dump that was told to end means that the tree runs on, whole."""
    return isinstance(error, AttemptFailed) and not isinstance(error, TreeDamaged)


def free_name(directory: Path, name: str) -> str:
    """Return `name`, or the first of ``name.1``, ``name.2``, … that `directory` does not have."""
    names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(1)))
    return next(one for one in names if not os.path.lexists(directory / one))


def _let_all_read(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_symlink():
            continue
        if path.is_dir():
            _let_all_read(path.iterdir())
            path.chmod(_READABLE | 0o111)
        else:
            path.chmod(_READABLE)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_image(name: str) -> bool:
    return name.endswith(".img") or name in (_PARENT, DESCRIPTORS) or name.startswith(PRE_COPY)


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
        hint = cure_of(error, _ELSEWHERE)
        if isinstance(error, UntrustedPath):
            hint = "dump into a directory of your own"
        raise UsageError(f"{path} cannot be written: {reason}", hint) from error
