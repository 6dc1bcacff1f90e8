"""Paths that other users can change: a walk along a path, by directory descriptors.

A symbolic link is followed only if this user or root made it, as with the kernel's
``fs.protected_symlinks``: the link is theirs, and others cannot make links there, or the directory
is sticky. Imports little: each restore waits for it.
"""

import errno
import grp
import os
import pwd
import stat
from collections.abc import Container
from contextlib import suppress
from enum import Enum
from typing import Final

__all__ = [
    "UntrustedPath", "Walk", "Writers", "check_directory", "is_descriptor", "user_name",
    "writers_of",
]  # fmt: skip

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LINKS: Final = 40  # as the kernel's MAXSYMLINKS


class UntrustedPath(PermissionError):
    """Another user decides, or could decide, which file this path names.

    Args:
        message: the component, and the user who can change it.
    """

    hint = "name a place that no other user can write to"

    def __init__(self, message: str) -> None:
        super().__init__(errno.EPERM, message)


class Writers(Enum):
    """The users that can make, rename and remove the entries of a directory."""

    TRUSTED = "this user and root"
    STICKY = "anyone makes entries, and renames and removes their own (as in /tmp)"
    GROUP = "a group, too"
    OTHERS = "another user"


class Walk:
    """A walk along a path. The caller closes it.

    Args:
        path: begins at the current directory, unless it begins with a slash.
        strict: whether all directories on the way must be this user's or root's, and others must
            not be able to write to them, unless they are sticky.
        create: make directories that do not exist, with mode 0700.

    Attributes:
        fd: the directory reached so far, opened with O_PATH; -1 if none.
        path: its path.

    The methods that walk raise `UntrustedPath`, or OSError if the way ends.
    """

    def __init__(self, path: str, *, strict: bool, create: bool = False) -> None:
        self._strict, self._create = strict, create
        self._links = 0
        self._rest: list[str] = []  # components still to walk, last one first
        self.fd, self.path = -1, ""
        self._path = path

    def take(self) -> int:
        """Return the descriptor; the caller closes it."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        """Close the descriptor, unless it has been taken."""
        if self.fd >= 0:
            os.close(self.take())

    def to_the_end(self) -> None:
        """Walk all of it; the last component must be a directory, or is made."""
        self._begin(self._path)
        while self._rest:
            self._step(self._rest.pop())

    def to_the_last(self) -> str:
        """Walk to the directory of the last component, without following it; return that component.

        Raises:
            IsADirectoryError: it is not a name (``/``, ``..``, or ends with a slash).
        """
        self._begin(self._path)
        while self._rest:
            part = self._rest.pop()
            if not self._rest and part not in (".", "..") and self._is_final(part):
                return part
            self._step(part)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.path)

    def _begin(self, path: str) -> None:
        if not path:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if path.startswith("/"):
            self._enter("/", "/")
        elif self.fd < 0:
            self._enter(".", ".")
        # A slash at the end asks for a directory.
        parts = path.split("/")
        end = ["."] if parts[-1] == "" and path.strip("/") else []
        named = [part for part in parts if part not in ("", ".")]
        self._rest += reversed([*named, *end])

    def _step(self, part: str) -> None:
        if part == ".":
            return
        if not self._is_link(part):
            self._descend(part)
            return
        self._links += 1
        if self._links > _LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), self._join(part))
        self._check_link(part)
        self._begin(os.readlink(part, dir_fd=self.fd))

    def _descend(self, part: str) -> None:
        try:
            self._enter(part, self._join(part))
        except FileNotFoundError:
            if not self._create:
                raise
            with suppress(FileExistsError):  # another process has made it
                os.mkdir(part, 0o700, dir_fd=self.fd)
            self._enter(part, self._join(part))

    def _enter(self, part: str, path: str) -> None:
        fd = os.open(part, _DIRECTORY, dir_fd=self.fd if self.fd >= 0 else None)
        self.close()
        self.fd, self.path = fd, path
        if self._strict:
            check_directory(os.fstat(fd), path, (Writers.TRUSTED, Writers.STICKY))

    def _check_link(self, part: str) -> None:
        writers = writers_of(os.fstat(self.fd))
        owner = os.stat(part, dir_fd=self.fd, follow_symlinks=False).st_uid
        if owner not in _trusted_users():
            raise UntrustedPath(f"the link {self._join(part)} belongs to {user_name(owner)}")
        if writers not in (Writers.TRUSTED, Writers.STICKY):
            raise UntrustedPath(f"the link {self._join(part)} is where others can put links")

    def _is_final(self, part: str) -> bool:
        return is_descriptor(self.fd, part) or not self._is_link(part)

    def _is_link(self, part: str) -> bool:
        try:
            status = os.stat(part, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISLNK(status.st_mode)

    def _join(self, part: str) -> str:
        return os.path.join(self.path, part)  # noqa: PTH118 - imports little


def writers_of(directory: os.stat_result) -> Writers:
    """Return the users that can make, rename and remove entries, by owner and mode.

    An access list (acl(5)) that permits others to write sets the write bit of the group.
    """
    if directory.st_uid not in _trusted_users():
        return Writers.OTHERS
    if directory.st_mode & stat.S_IWOTH:
        return Writers.STICKY if directory.st_mode & stat.S_ISVTX else Writers.OTHERS
    if directory.st_mode & stat.S_IWGRP and not _is_private_group(directory):
        return Writers.STICKY if directory.st_mode & stat.S_ISVTX else Writers.GROUP
    return Writers.TRUSTED


def check_directory(
    status: os.stat_result, path: str, allowed: Container[Writers], owners: Container[int] = ()
) -> None:
    """Refuse a directory.

    Args:
        status: of the directory.
        path: of it, for messages.
        allowed: the users that may make, rename and remove its entries.
        owners: permitted owners; by default this user and root.

    Raises:
        UntrustedPath: it has another owner, or others can write to it.
    """
    if status.st_uid not in (owners or _trusted_users()):
        raise UntrustedPath(f"the directory {path} belongs to {user_name(status.st_uid)}")
    if writers_of(status) not in allowed:
        raise UntrustedPath(f"others can write to the directory {path}")


def _trusted_users() -> tuple[int, int]:
    return os.geteuid(), 0


def _is_private_group(status: os.stat_result) -> bool:
    # A user's own group, as USERGROUPS_ENAB of login.defs(5) makes them; the umask is 002 then.
    try:
        user, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    return user.pw_name == group.gr_name and not {*group.gr_mem} - {user.pw_name}


def is_descriptor(directory: int, name: str) -> bool:
    """Tell whether the directory is ``/proc/self/fd``, whose links have no path (proc(5))."""
    if not name.isdecimal():
        return False
    try:
        own = os.stat("/proc/self/fd")  # noqa: PTH116 - imports little
    except OSError:
        return False
    here = os.fstat(directory)
    return (here.st_dev, here.st_ino) == (own.st_dev, own.st_ino)


def user_name(uid: int) -> str:
    """Return ``user NAME``, for messages."""
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
