"""What is parsed once a kernel build and then remembered, in the user's cache directory.

Remembered are pure functions of bytes that the guest holds: the symbol names written out, the
place of each type in BTF. A file is named by the kernel's BUILD-ID and good only for exactly the
bytes it was made from: it carries their SHA-256. So a guest that claims the BUILD-ID of another
kernel can neither use that kernel's file nor spoil it for others. Addresses are not remembered:
each guest's own tables give them, wherever KASLR put it.

A file that is missing, damaged, of another version or another user is made again. A guest's lies
cannot fill the disk: what is too large is not kept, and only so many files are.
"""

import hashlib
import logging
import os
import re
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ovr.user_cache import user_cache

__all__ = ["cache_directory", "read_own", "remembered"]

MAGIC: Final = b"ovr-kernel-1\n\0\0\0"
HEADER: Final = struct.Struct("<16s32sII")  # magic, SHA-256 of the source, CRC and size of the rest
LENGTH: Final = struct.Struct("<Q")
ELEMENTS: Final = {"|u1", "<i4"}
MAX_SIZE: Final = 1 << 25
KEPT: Final = 64
BUILD_ID: Final = re.compile(r"[0-9a-f]{16,128}")

Table = NDArray[Any]

log = logging.getLogger("ovr.kernel.cache")


def cache_directory() -> Path:
    """Return where the files are: ``$XDG_CACHE_HOME/ovr/kernel`` or ``~/.cache/ovr/kernel``."""
    return user_cache() / "kernel"


def remembered(
    build_id: str, what: str, source: Sequence[bytes], make: Callable[[], tuple[Table, ...]]
) -> tuple[Table, ...]:
    """Return what `make` returns, from the cache where it is known.

    Args:
        build_id: the kernel's; without one (or with one that makes no sense) nothing is kept.
        what: names the kind of tables, and so their number and element types.
        source: all that the tables are made from, in pieces.
        make: makes the tables; one-dimensional, of numbers.
    """
    try:
        path = cache_directory() / f"{build_id}.{what}"
    except RuntimeError:  # this user has no home
        return make()
    if not BUILD_ID.fullmatch(build_id):
        return make()
    digest = _digest(source)
    tables = _load(path, digest)
    if tables is None:
        tables = make()
        # The cache is a convenience: a full disk or a read-only home is no reason to fail.
        with suppress(OSError):
            _store(path, digest, tables)
    return tables


def read_own(path: Path, limit: int) -> bytes:
    """Return what is in a file of this user's that nobody else can write to.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no such file, or larger than `limit` bytes.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        others = stat.S_IWGRP | stat.S_IWOTH
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise ValueError("not a file of ours")
        if status.st_uid != os.geteuid() or status.st_mode & others:
            raise ValueError("somebody else may write to it")
        return file.read(limit)


def _digest(source: Sequence[bytes]) -> bytes:
    total = hashlib.sha256()
    for piece in source:
        total.update(LENGTH.pack(len(piece)))
        total.update(piece)
    return total.digest()


def _load(path: Path, digest: bytes) -> tuple[Table, ...] | None:
    try:
        data = read_own(path, MAX_SIZE)
        magic, of, crc, size = HEADER.unpack_from(data)
        body = memoryview(data)[HEADER.size :]
        if (magic, of, crc, size) == (MAGIC, digest, zlib.crc32(body), len(body)):
            return tuple(_tables(body))
        log.info("%s is damaged or of another kernel: it is made again", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, struct.error) as error:
        log.info("%s cannot be used (%s): it is made again", path, error)
    return None


def _store(path: Path, digest: bytes, tables: Sequence[Table]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    body = b"".join(_packed(table) for table in tables)
    if len(body) > MAX_SIZE - HEADER.size:
        return
    fd, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(HEADER.pack(MAGIC, digest, zlib.crc32(body), len(body)) + body)
        Path(fresh).rename(path)
        for old in sorted(path.parent.glob("*.*"), key=_age)[KEPT:]:
            old.unlink(missing_ok=True)
    except BaseException:
        with suppress(OSError):
            Path(fresh).unlink()
        raise


def _age(path: Path) -> float:
    return -path.stat().st_mtime


def _packed(table: Table) -> bytes:
    data = table.tobytes()
    return table.dtype.str.encode().ljust(8) + LENGTH.pack(len(data)) + data


def _tables(body: memoryview) -> list[Table]:
    # What the checksum covers was written by `_store`.
    tables = []
    at = 0
    while at < len(body):
        element = bytes(body[at : at + 8]).decode().rstrip()
        if element not in ELEMENTS:
            raise ValueError(f"elements {element!r}")
        (size,) = LENGTH.unpack_from(body, at + 8)
        tables.append(np.frombuffer(body[at + 16 : at + 16 + size], element))
        at += 16 + size
    return tables
