"""The socket of the standby process, in a directory of this user's own.

The directory has mode 0700, and no other user can change any component of its path (`ovr.host`),
so none can connect, or listen in its place. A container may still share the directory; `proof`
covers that. Imports little: each restore waits for it.
"""

import errno
import os
import socket
import zlib
from contextlib import suppress
from fcntl import LOCK_EX, flock
from typing import Final, Self

from ovr.host import Directory, UntrustedPath
from ovr.standby.messages import version

__all__ = ["Place", "connect"]

_OF_ROOT: Final = "/run/ovr-standby"
_NAME: Final = "ovr-standby"
_PATIENCE: Final = 1.0  # seconds, to connect and for each answer until a restore begins


def connect() -> socket.socket:
    """Return a connection to the listening process, with a timeout.

    Raises:
        OSError: none listens, or the directory is not trusted.
    """
    with _directory(create=False) as directory:
        return _connect(directory)


class Place:
    """The bound socket, locked for this process.

    Raises:
        OSError: another process stands by already, or the directory is not trusted.
    """

    def __init__(self) -> None:
        self._directory = _directory(create=True)
        self._lock = -1
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._lock = os.open(".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory.fileno())
            flock(self._lock, LOCK_EX)  # until it listens, the socket looks dead to others
            self._remove_dead()
            self.socket.bind(_path(self._directory))
            self._inode = self._directory.status(_name()).st_ino
        except BaseException:
            self.leave()
            raise

    def listen(self) -> None:
        """Listen; the calling process becomes the peer that clients see (SO_PEERCRED)."""
        self.socket.listen()
        self._unlock()

    def remove(self) -> None:
        """Remove the socket, so that another process can stand by, and `leave`."""
        with suppress(OSError):  # another process has removed it
            if self._directory.status(_name()).st_ino == self._inode:
                self._directory.remove(_name())
        self.leave()

    def leave(self) -> None:
        """Close all descriptors, as a forked child does; the socket stays where it is."""
        self._unlock()
        self.socket.close()
        self._directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _remove_dead(self) -> None:
        # The socket of a killed process: connections are refused.
        try:
            _connect(self._directory).close()
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            self._directory.remove(_name())
            return
        raise OSError(errno.EADDRINUSE, "another process stands by already")


def _connect(directory: Directory) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.settimeout(_PATIENCE)
        server.connect(_path(directory))
    except BaseException:
        server.close()
        raise
    return server


def _directory(*, create: bool) -> Directory:
    directory = Directory.private(_directory_path(), create=create)
    if os.fstat(directory.fileno()).st_mode & 0o077:
        directory.close()
        raise UntrustedPath(f"the directory {directory.path} is open to others")
    return directory


def _directory_path() -> str:
    if os.geteuid() == 0:  # the same for all of root's sessions, and without one
        return _OF_ROOT
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        with suppress(OSError):
            status = os.stat(runtime)  # noqa: PTH116 - imports little
            if status.st_uid == os.geteuid() and not status.st_mode & 0o077:
                return f"{runtime}/{_NAME}"
    from ovr.host.user_cache import user_cache  # noqa: PLC0415 - seldom needed

    return str(user_cache() / "standby")


def _path(directory: Directory) -> str:
    # By descriptor: the directory that was checked, and short enough for sun_path (unix(7)).
    return f"/proc/self/fd/{directory.fileno()}/{_name()}"


def _name() -> str:
    # A home may be shared with other hosts, whose sockets look dead from here.
    host = os.fsencode(os.uname().nodename)
    return f"{zlib.crc32(version() + host):08x}"
