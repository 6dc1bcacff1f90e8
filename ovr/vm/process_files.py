"""The mappings of a process, and its open files, with the rights that it has to them.

A process that poses as QEMU must not make ovr write to a file that it cannot write to itself. So a
mapped file is never opened by its name: the process's own open file description is duplicated
(``pidfd_getfd``), which permits the same as to the process, whatever rights ovr has.

``pidfd_getfd`` needs the right to trace the process. If ovr may only read its /proc (as the same
user, under Yama's ``ptrace_scope`` 1 or in a container), ``/proc/PID/fd/N`` is opened instead, with
ovr's rights. Then the mapping is the proof: before and after, it must be a shared and writable
mapping of that file, which a process without the right to write cannot make.
"""

import ctypes
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, Self

from ovr.errors import CheckFailed, RamNotShared
from ovr.memory.ram import RamFile

__all__ = ["SHARE_IT", "Mapping", "ProcessFiles", "parse_maps"]

SHARE_IT: Final = (
    "start QEMU with -object memory-backend-file,id=ram,size=SIZE,mem-path=/dev/shm/vm,share=on "
    "-machine memory-backend=ram (libvirt: <memoryBacking><source type='memfd'/>"
    "<access mode='shared'/></memoryBacking>)"
)
"""The options that give a VM shared RAM, for hints."""

_SYS_PIDFD_GETFD: Final = 438  # in v5.6
_MAPS_LIMIT: Final = 32 << 20  # bytes: ten times the text of 65,530 mappings (vm.max_map_count)
_FILES_LIMIT: Final = 1 << 16
_MAPPING = re.compile(
    r"([0-9a-f]{1,16})-([0-9a-f]{1,16}) .(.).([sp]) ([0-9a-f]{1,16})"
    r" ([0-9a-f]{1,8}):([0-9a-f]{1,8}) (\d{1,20}) *(.*)"
)
_BECOME: Final = "run as root, or as the user that runs QEMU, on its host"
_FOREIGN: Final = "is this QEMU's own QMP socket? Name the VM by it, or by pid:N"


@dataclass(frozen=True)
class Mapping:
    """A line of ``/proc/PID/maps``: addresses ``[start, end)`` of the process.

    Attributes:
        shared: ``MAP_SHARED``.
        writable: the process may write to it now.
        offset: its start in the file, in bytes.
        device: of the file system, in the form of ``os.makedev``.
        inode: the file's inode number.
        path: the file's name when it was opened.
    """

    start: int
    end: int
    shared: bool
    writable: bool
    offset: int
    device: int
    inode: int
    path: str


def parse_maps(text: str) -> list[Mapping]:
    """Return the lines of a ``/proc/PID/maps`` that are mappings of files, ascending."""
    found = []
    for line in text.splitlines():
        match = _MAPPING.fullmatch(line)
        if match is None or match[8] == "0":
            continue
        start, end, writable, shared, offset, major, minor, inode, path = match.groups()
        device = os.makedev(int(major, 16), int(minor, 16))
        found.append(
            Mapping(
                int(start, 16), int(end, 16), shared == "s", writable == "w", int(offset, 16),
                device, int(inode), path,
            )
        )  # fmt: skip
    return found


class ProcessFiles:
    """The mappings and open files of one process; a context manager.

    Its directory in ``/proc`` is kept open, and so stays that of the same process: once this has
    ended, reads fail (``ESRCH``), even if another process has its pid.

    Args:
        pid: the process.

    Raises:
        CheckFailed: there is none, or it may not be read.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._mappings: tuple[str, list[Mapping]] | None = None  # as last read
        try:
            self._directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable("", error) from error
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:
            os.close(self._directory)
            raise self._unreadable("", error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._pidfd)
        os.close(self._directory)

    def check_owner(self, owner: int | None) -> None:
        """Make sure that the process still has the owner that it had when it called listen(2).

        The kernel reports the pid of that time. Since then, the process may have run a set-uid
        program, or ended and left its pid to another process, while its child answers at the
        socket. A process of root may have changed to any user since (``-run-with user=…``).

        Args:
            owner: the uid of that time; None if another program vouches for the pid.

        Raises:
            CheckFailed: it is another user's.
        """
        uids = self._uids()
        if owner in (None, 0, os.geteuid()) or uids == {owner}:
            return
        raise CheckFailed(
            f"process {self.pid} is not the one that listened as user {owner}: it runs as user"
            f" {', '.join(map(str, sorted(uids)))}",
            _FOREIGN,
        )

    def mappings(self) -> list[Mapping]:
        """Return its present mappings of files.

        Raises:
            CheckFailed: it has ended, or may not be read.
        """
        text = self._text("maps", _MAPS_LIMIT)
        if self._mappings is None or self._mappings[0] != text:
            self._mappings = text, parse_maps(text)
        return self._mappings[1]

    def open_mapped(self, mapping: Mapping) -> RamFile:
        """Take over the descriptor by which the process can write to the file of a mapping.

        Args:
            mapping: shared and writable. The caller must check that it still exists afterwards;
                otherwise the file may be another one (see the module).

        Raises:
            RamNotShared: the process has closed the file, or has it open for reading only; or it
                is no regular file.
            CheckFailed: its open files cannot be read.
        """
        wanted, read_only = self._identity(mapping), False
        for number in self._numbers():
            if self._status(number) != wanted:
                continue
            fd = self._duplicate(number)
            if fd is None:
                continue
            file = RamFile(fd, mapping.path)
            if _identity(os.fstat(fd)) != wanted or self._identity(mapping) != wanted:
                continue  # another file by now
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise RamNotShared(f"the VM's RAM {mapping.path} is no regular file", SHARE_IT)
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
                return file
            read_only = True
        if read_only:
            raise RamNotShared(
                f"QEMU has the VM's RAM file {mapping.path} open for reading only", SHARE_IT
            )
        raise RamNotShared(
            f"the VM's RAM file {mapping.path} is gone: QEMU itself has closed it", SHARE_IT
        )

    def _identity(self, mapping: Mapping) -> tuple[int, int]:
        # As fstat() has it. On btrfs `maps` has another device, the same for all subvolumes;
        # map_files leads to the mapped file itself, but needs CAP_CHECKPOINT_RESTORE.
        name = f"map_files/{mapping.start:x}-{mapping.end:x}"
        try:
            return _identity(os.stat(name, dir_fd=self._directory))
        except OSError:  # not permitted, or split meanwhile by madvise()
            return mapping.device, mapping.inode

    def _numbers(self) -> Iterator[str]:
        try:
            fd = os.open("fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._directory)
            try:
                with os.scandir(fd) as found:
                    yield from [entry.name for entry in islice(found, _FILES_LIMIT)]
            finally:
                os.close(fd)
        except OSError as error:
            raise self._unreadable("/fd", error) from error

    def _status(self, number: str) -> tuple[int, int] | None:
        try:
            return _identity(os.stat(f"fd/{number}", dir_fd=self._directory))
        except OSError:  # closed meanwhile
            return None

    def _duplicate(self, number: str) -> int | None:
        # Another descriptor of the process's own open file description, None if it is closed.
        libc = ctypes.CDLL(None, use_errno=True)
        fd: int = libc.syscall(_SYS_PIDFD_GETFD, self._pidfd, int(number), 0)
        if fd >= 0:
            return fd
        if ctypes.get_errno() in (errno.EPERM, errno.ENOSYS):
            return self._reopened(number)
        return None

    def _reopened(self, number: str) -> int | None:
        # With the process's own access mode. O_NONBLOCK: a device in its place must not block us.
        try:
            flags = re.search(r"^flags:\s*([0-7]+)$", self._text(f"fdinfo/{number}", 4096), re.M)
            if flags is None or int(flags[1], 8) & os.O_ACCMODE != os.O_RDWR:
                mode = os.O_RDONLY
            else:
                mode = os.O_RDWR
            return os.open(
                f"fd/{number}", mode | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC,
                dir_fd=self._directory,
            )  # fmt: skip
        except OSError:
            return None

    def _uids(self) -> set[int]:
        match = re.search(r"^Uid:\s*(.*)$", self._text("status", 1 << 16), re.M)
        return {int(uid) for uid in match[1].split()} if match else set()

    def _text(self, name: str, limit: int) -> str:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
            with os.fdopen(fd, "rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise self._unreadable(f"/{name}", error) from error
        if len(data) > limit:
            raise CheckFailed(f"QEMU's /proc/{self.pid}/{name} is too long", "is this QEMU?")
        return os.fsdecode(data)

    def _unreadable(self, name: str, error: OSError) -> CheckFailed:
        return CheckFailed(f"/proc/{self.pid}{name} cannot be read: {error.strerror}", _BECOME)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
