"""An archive as an uncompressed tar: the file itself, or what its unpacker gives.

What is packed is unpacked by the program that everybody has for it, which runs beside us, into a
file without a name: it is gone when nobody has it open any more, however we end.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from ovr.errors import ImagesDamaged, UsageError
from ovr.images.framing import DUMP_AGAIN
from ovr.images.packed import HEAD_SIZE, packing

__all__ = ["open_tar"]

_PACKAGES: Final = {"zstd": "zstd", "gzip": "gzip", "xz": "xz-utils", "lz4": "lz4",
                    "bzip2": "bzip2"}  # fmt: skip
_SPARE: Final = 64 << 20  # bytes to leave free where we unpack


def open_tar(path: Path) -> int:
    """Return a descriptor of the uncompressed tar; the caller closes it.

    Raises:
        UsageError: no such file, no archive, or no program or room to unpack it.
        ImagesDamaged: it cannot be unpacked to its end.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be opened: {error.strerror}",
            "give the file that `podman container checkpoint --export` wrote",
        ) from error
    try:
        found = _packing(fd, path)
        return os.dup(fd) if found == "tar" else _unpacked(fd, path, found)
    finally:
        os.close(fd)


def _packing(fd: int, path: Path) -> str:
    try:
        found = packing(os.pread(fd, HEAD_SIZE, 0))
    except IsADirectoryError as error:
        raise UsageError(f"{path}: a directory, no archive", f"ovr restore -D {path}") from error
    if found is None:
        raise UsageError(
            f"{path}: no tar archive, packed or not",
            "give the file that `podman container checkpoint --export` wrote",
        )
    return found[0]


def _unpacked(fd: int, path: Path, packed_with: str) -> int:
    program = shutil.which(packed_with)
    if program is None:
        raise UsageError(
            f"{path}: packed with {packed_with}, which is not installed here",
            f"apt-get install {_PACKAGES[packed_with]}",
        )
    # /tmp is often memory, and an archive may be as large as the memory of its container.
    with tempfile.TemporaryFile(dir=os.environ.get("TMPDIR", "/var/tmp")) as target:
        done = subprocess.run(
            [program, "-dc"], stdin=fd, stdout=target, stderr=subprocess.PIPE, check=False
        )
        if done.returncode:
            raise _not_unpacked(path, target.fileno(), done.stderr.decode(errors="replace"))
        if not packing(os.pread(target.fileno(), HEAD_SIZE, 0)) == ("tar", "tar -xf"):
            raise UsageError(
                f"{path}: packed with {packed_with}, but no tar archive inside",
                "give the file that `podman container checkpoint --export` wrote",
            )
        return os.dup(target.fileno())


def _not_unpacked(path: Path, target: int, words: str) -> UsageError | ImagesDamaged:
    room = os.fstatvfs(target)
    if room.f_bavail * room.f_frsize < _SPARE:
        return UsageError(
            f"{path}: no room to unpack it", "set TMPDIR to a directory with room for all of it"
        )
    lines = words.strip().splitlines() or ["no message"]
    return ImagesDamaged(f"{path}: cannot be unpacked: {lines[-1]}", DUMP_AGAIN)
