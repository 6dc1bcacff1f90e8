"""Files made, overwritten and replaced by directory descriptor, where no other user can interfere.

A file is opened only in a directory of this user or root. If others can make entries there too
(sticky, as in /tmp, or by group), it must be new, or this user's own without other hard links.
Imports little: each restore waits for it.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from typing import IO, Final, Self

from ovr.host.closing import Closing
from ovr.host.trust import (
    UntrustedPath,
    Walk,
    Writers,
    check_directory,
    is_descriptor,
    user_name,
    writers_of,
)  # fmt: skip

__all__ = ["Directory", "Replacement", "locate"]

_FILE: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
_SHARED: Final = (Writers.TRUSTED, Writers.STICKY, Writers.GROUP)
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


class Directory(Closing):
    """An open directory, of this user or root.

    Attributes:
        path: as walked, for messages.
    """

    def __init__(self, fd: int, path: str) -> None:
        """Take over the descriptor `fd`, which `locate` or `private` has checked."""
        self._fd = fd
        self.path = path
        self._writers = writers_of(os.fstat(fd))

    @classmethod
    def private(cls, path: str | PathLike[str], *, create: bool = False) -> Self:
        """Open a directory of this user's own that no one else can write to or take away.

        All directories on the way are this user's or root's, and others cannot write to them or
        they are sticky; so only this user and root can change where the path leads.

        Args:
            path: of the directory.
            create: make it, and those on the way, with mode 0700 if they do not exist.

        Raises:
            UntrustedPath: another user can change it.
            OSError: it does not exist, or cannot be opened or made.
        """
        whole = os.fspath(path)
        if not whole.startswith("/"):
            whole = os.path.join(os.getcwd(), whole)  # noqa: PTH109, PTH118 - imports little
        walk = Walk(whole, strict=True, create=create)
        try:
            walk.to_the_end()
            check_directory(
                os.fstat(walk.fd), walk.path, (Writers.TRUSTED,), owners=(os.geteuid(),)
            )
            return cls(walk.take(), walk.path)
        finally:
            walk.close()

    def fileno(self) -> int:
        """Return the descriptor, opened with O_PATH."""
        return self._fd

    def create(self, name: str, mode: int = 0o666) -> int:
        """Return a descriptor of a new file, to write to.

        Raises:
            FileExistsError: the name exists.
            OSError: it cannot be made.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE
        return os.open(name, flags, mode, dir_fd=self._fd)

    def overwrite(self, name: str, mode: int = 0o666) -> int:
        """Return a descriptor of an empty file, to write to: a new one, or the existing one.

        A device or a pipe is opened as well. One of this process's descriptors (``/dev/stdout``,
        ``/proc/self/fd/3``) is duplicated: it is neither opened again nor truncated.

        Raises:
            UntrustedPath: the existing file has other hard links, or is another user's.
            OSError: it cannot be opened.
        """
        if is_descriptor(self._fd, name):
            return os.dup(int(name))
        before = self._status(name)
        if before is None:
            return self.create(name, mode)
        self._check_entry(name, before)
        # Opening a regular file does not block; O_NONBLOCK covers a file that takes its place now.
        blocking = 0 if not stat.S_ISREG(before.st_mode) else os.O_NONBLOCK
        fd = os.open(name, os.O_WRONLY | blocking | _FILE, dir_fd=self._fd)
        try:
            after = os.fstat(fd)
            if (after.st_dev, after.st_ino) != (before.st_dev, before.st_ino):
                raise UntrustedPath(f"{self._join(name)} was exchanged while it was opened")
            os.set_blocking(fd, True)
            if stat.S_ISREG(after.st_mode):
                os.ftruncate(fd, 0)
        except BaseException:
            os.close(fd)
            raise
        return fd

    @contextmanager
    def replacement(
        self, name: str, mode: int = 0o666, *, in_place: bool = False
    ) -> Iterator["Replacement"]:
        """Yield a new file that can take the place of `name`.

        Without `Replacement.put` it is removed.

        Args:
            name: the entry to replace; it is not opened.
            mode: of the file, if it is new, less the umask.
            in_place: use `overwrite` if the entry is no regular file (``/dev/stdout``).

        Raises:
            UntrustedPath: the entry is another user's.
            OSError: no file can be made here.
        """
        before = self._status(name)
        if before is not None:
            self._check_entry(name, before)
        direct = in_place and before is not None and not stat.S_ISREG(before.st_mode)
        fresh = name if direct else _fresh_name(name)
        fd = self.overwrite(name) if direct else self.create(fresh, mode)
        replacement = Replacement(self, "" if direct else fresh, name, os.fdopen(fd, "wb"))
        try:
            yield replacement
        finally:
            replacement.close()

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a regular file of this user's that no one else can write to.

        Raises:
            ValueError: it is no such file, or larger than `limit` bytes.
            OSError: it cannot be opened.
        """
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _FILE, dir_fd=self._fd)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
                raise ValueError(f"no regular file of at most {limit} bytes")
            if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
                raise ValueError("another user can write to it")
            return file.read(limit)

    def names(self) -> Sequence[str]:
        """Return the names of all entries.

        Raises:
            OSError: the directory cannot be read.
        """
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            return os.listdir(fd)  # noqa: PTH208 - of a descriptor
        finally:
            os.close(fd)

    def rename(self, old: str, new: str) -> None:
        """Rename an entry, over another one if there is one."""
        os.rename(old, new, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """Remove an entry that is no directory, if it exists."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def status(self, name: str) -> os.stat_result:
        """Return the status of an entry, of a link itself.

        Raises:
            OSError: there is none.
        """
        return os.stat(name, dir_fd=self._fd, follow_symlinks=False)

    def close(self) -> None:
        """Close it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _check_entry(self, name: str, status: os.stat_result) -> None:
        # Only this user and root can have made it: any file will do.
        if self._writers is Writers.TRUSTED:
            return
        if status.st_uid != os.geteuid():
            raise UntrustedPath(f"{self._join(name)} belongs to {user_name(status.st_uid)}")
        if status.st_nlink != 1:
            raise UntrustedPath(f"{self._join(name)} has other names, which others may have made")

    def _status(self, name: str) -> os.stat_result | None:
        try:
            return self.status(name)
        except FileNotFoundError:
            return None

    def _join(self, name: str) -> str:
        return os.path.join(self.path, name)  # noqa: PTH118 - imports little


class Replacement:
    """A file that replaces another one completely or not at all.

    Attributes:
        file: to write to.
    """

    def __init__(self, directory: Directory, fresh: str, name: str, file: IO[bytes]) -> None:
        self._directory = directory
        self._fresh = fresh  # its temporary name; empty if it is written in place
        self._name = name
        self.file = file

    def put(self) -> None:
        """Replace the other file by this one, which is complete.

        Raises:
            OSError: the disk is full, or the entry cannot be replaced.
        """
        self.file.close()
        if self._fresh:
            self._directory.rename(self._fresh, self._name)
            self._fresh = ""

    def close(self) -> None:
        """Close the file; remove it unless it has replaced the other one."""
        with suppress(OSError):  # its buffer could not be written
            self.file.close()
        if self._fresh:
            self._directory.remove(self._fresh)


def locate(path: str | PathLike[str]) -> tuple[Directory, str]:
    """Return the directory in which a file of this path is, or would be, and its name there.

    The caller closes the directory. Links made by this user or root are followed, also as the last
    component.

    Raises:
        UntrustedPath: another user made a link on the way, or can change the directory.
        OSError: a directory on the way does not exist, or cannot be entered.
    """
    walk = Walk(os.fspath(path), strict=False)
    try:
        name = walk.to_the_last()
        check_directory(os.fstat(walk.fd), walk.path, _SHARED)
        return Directory(walk.take(), walk.path), name
    finally:
        walk.close()


def _fresh_name(name: str) -> str:
    return f".{os.fsdecode(os.fsencode(name)[:200])}.{os.urandom(8).hex()}"
