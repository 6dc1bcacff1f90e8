"""Open an archive as an uncompressed tar: the file itself, or the output of its unpacker.

A packed archive is unpacked by its usual program, as a child process, into a file without a name,
which the kernel deletes when its last descriptor is closed, even if ``ovr`` is killed. The output
passes through ``ovr``, so that no more is written than headers announce and the disk has room for.
"""

import errno
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Final, cast

from ovr.checkpoint.tar import BLOCK, Member, read_members
from ovr.errors import ImagesDamaged, ImagesUnsupported, OvrError, UsageError
from ovr.host import cure_of
from ovr.images.framing import DUMP_AGAIN
from ovr.images.packed import HEAD_SIZE, packing

__all__ = ["open_tar"]

_PACKAGES: Final = {"zstd": "zstd", "gzip": "gzip", "xz": "xz-utils", "lz4": "lz4",
                    "bzip2": "bzip2"}  # fmt: skip
# A few bytes of input can request a window of 4 GiB; zstd has a limit of its own (128 MiB).
_OPTIONS: Final = {"xz": ("--memlimit-decompress=512MiB",)}
_CHUNK: Final = 1 << 20
_AFTER_END: Final = 1 << 20  # bytes of padding that may follow the end of a tar
_SPARE: Final = 1 << 30  # bytes to leave free on the file system, or a tenth of its size if less
_OTHERS: Final = 1 << 30  # bytes besides memory: the agent accepts no more (`guest/images.c`)
_OF_PODMAN: Final = "give the file that `podman container checkpoint --export` wrote"


def open_tar(path: Path) -> tuple[int, dict[str, Member]]:
    """Return a descriptor of the uncompressed tar, which the caller closes, and its members.

    Raises:
        UsageError: no such file, not an archive, or no program or space to unpack it.
        ImagesDamaged: it cannot be unpacked completely, or as `read_members`.
        ImagesUnsupported: as `read_members`, or it is larger than this host can restore.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # it may be a FIFO
    except OSError as error:
        raise UsageError(f"{path}: cannot be opened: {error.strerror}", _OF_PODMAN) from error
    try:
        found = _packing(fd, path)
        if found != "tar":
            return _unpacked(fd, path, found)
        members = read_members(_Plain(fd), path)
        return os.dup(fd), members
    finally:
        os.close(fd)


def _packing(fd: int, path: Path) -> str:
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path}: a directory, not an archive", f"ovr restore -D {path}")
    found = packing(os.pread(fd, HEAD_SIZE, 0)) if stat.S_ISREG(mode) else None
    if found is None:
        raise UsageError(f"{path}: not a tar archive, packed or not", _OF_PODMAN)
    return found[0]


class _Plain:
    """A plain tar, read in place."""

    def __init__(self, fd: int) -> None:
        self._fd, self._at, self._end = fd, 0, os.fstat(fd).st_size

    def read(self, size: int) -> bytes:
        data = os.pread(self._fd, size, self._at)
        self._at += len(data)
        return data

    def skip(self, size: int) -> int:
        there = min(size, self._end - self._at)
        self._at += there
        return there


def _unpacked(fd: int, path: Path, packed_with: str) -> tuple[int, dict[str, Member]]:
    program = shutil.which(packed_with)
    if program is None:
        raise UsageError(
            f"{path}: packed with {packed_with}, which is not installed here",
            f"apt-get install {_PACKAGES[packed_with]}",
        )
    command = [program, "-dc", *_OPTIONS.get(packed_with, ())]
    directory = os.environ.get("TMPDIR", "/var/tmp")
    # Not /tmp, which is often in memory: an archive may be as large as its container's memory.
    with (
        _scratch(directory, path) as target,
        _scratch(directory, path) as messages,
        subprocess.Popen(command, stdin=fd, stdout=subprocess.PIPE, stderr=messages) as process,
    ):
        try:
            source = _Unpacking(process, target.fileno(), messages, path)
            members = source.members(packed_with)
        finally:
            process.kill()  # no effect if it has ended
        return os.dup(target.fileno()), members


def _scratch(directory: str, path: Path) -> IO[bytes]:
    try:
        return cast(IO[bytes], tempfile.TemporaryFile(dir=directory))
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be unpacked to {directory}: {error.strerror}",
            cure_of(error, "set TMPDIR to a directory with space for all of it"),
        ) from error


class _Unpacking:
    """The output of an unpacker as a tar; the part read so far is kept in a file."""

    def __init__(
        self, process: subprocess.Popen[bytes], target: int, messages: IO[bytes], path: Path
    ) -> None:
        assert process.stdout is not None
        self._process, self._pipe = process, process.stdout.fileno()
        self._target, self._messages, self._path = target, messages, path
        self._written = 0
        self._most = _memory_of_this_host() + _OTHERS
        self._head = b""

    def members(self, packed_with: str) -> dict[str, Member]:
        self._head = self.read(BLOCK)
        if packing(self._head) != ("tar", "tar -xf"):
            raise UsageError(
                f"{self._path}: packed with {packed_with}, but no tar archive inside", _OF_PODMAN
            )
        members = read_members(self, self._path)
        self._finish()
        return members

    def read(self, size: int) -> bytes:
        if self._head:  # the first header, read in `members`
            head, self._head = self._head, b""
            return head
        parts: list[bytes] = []
        self._take(size, parts)
        return b"".join(parts)

    def skip(self, size: int) -> int:
        self._check_room(size)
        return self._take(size)

    def _take(self, size: int, parts: list[bytes] | None = None) -> int:
        taken = 0
        while taken < size:
            if self._written % _CHUNK == 0:
                self._check_room(0)
            # Up to a multiple of `_CHUNK`, so that the space is checked after each chunk.
            data = os.read(self._pipe, min(size - taken, _CHUNK - self._written % _CHUNK))
            if not data:
                self._ended()
                break
            self._write(data)
            taken += len(data)
            if parts is not None:
                parts.append(data)
        return taken

    def _write(self, data: bytes) -> None:
        try:
            at = 0
            while at < len(data):
                at += os.write(self._target, data[at:])
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self._no_room() from error
            raise
        self._written += len(data)

    def _check_room(self, size: int) -> None:
        if self._written + size > self._most:
            raise ImagesUnsupported(
                f"{self._path}: at least {self._written + size} bytes when unpacked, more than the"
                f" {self._most} that fit into this host's memory",
                "if it is intact, unpack it first: a plain archive is read in place",
            )
        where = os.fstatvfs(self._target)
        free = where.f_bavail * where.f_frsize
        if size > free - min(_SPARE, where.f_blocks * where.f_frsize // 10):
            raise self._no_room()

    def _no_room(self) -> OvrError:
        return UsageError(
            f"{self._path}: no space to unpack it",
            "set TMPDIR to a directory with space for all of it, and 1 GiB to spare",
        )

    def _ended(self) -> None:
        # At an early end of the output, the unpacker's own error is reported first.
        if self._process.wait():
            self._messages.seek(0)
            lines = self._messages.read(1 << 16).decode(errors="replace").strip().splitlines()
            last = lines[-1] if lines else "no message"
            raise ImagesDamaged(f"{self._path}: cannot be unpacked: {last}", DUMP_AGAIN)

    def _finish(self) -> None:
        # Only padding may follow. The unpacker verifies its checksum at the end of its input.
        left = _AFTER_END
        while data := os.read(self._pipe, _CHUNK):
            left -= len(data)
            if left < 0:
                raise ImagesDamaged(f"{self._path}: more data after the end of the tar", DUMP_AGAIN)
        self._ended()


def _memory_of_this_host() -> int:
    # The limit of a restore: its pages go into the RAM of a VM on this host.
    import psutil  # noqa: PLC0415 - needed for packed archives only

    return int(psutil.virtual_memory().total + psutil.swap_memory().total)
