"""Tables that are parsed once for each kernel build, cached in the user's cache directory.

The tables are pure functions of bytes in guest memory: the expanded symbol names, the position of
each type in BTF. A file is named by the kernel's build id and carries the SHA-256 of the bytes
that it was made from, and is valid for exactly those. So a guest that shows the build id of another
kernel can neither use that kernel's file nor spoil it for others. Addresses are not cached: they
come from each guest's own tables, wherever KASLR put the kernel.

A file that is missing, damaged, of another version or of another user is made again. A hostile
guest cannot fill the disk: large tables are not stored, and the number of files is limited. If
another user can change the directory, the cache is off: nothing in it is read, written or deleted.
"""

import hashlib
import logging
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ovr.host import Directory, UntrustedPath
from ovr.host.user_cache import user_cache

__all__ = ["cache_directory", "opened", "remembered"]

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
    """Return the directory: ``$XDG_CACHE_HOME/ovr/kernel`` or ``~/.cache/ovr/kernel``."""
    return user_cache() / "kernel"


def remembered(
    build_id: str, what: str, source: Sequence[bytes], make: Callable[[], tuple[Table, ...]]
) -> tuple[Table, ...]:
    """Return the result of `make`, from the cache if it is there.

    Args:
        build_id: the kernel's; without a well-formed one, nothing is cached.
        what: names the kind of tables, and so their number and element types.
        source: all bytes that the tables are made from, in pieces.
        make: makes the tables: one-dimensional arrays of numbers.
    """
    if not BUILD_ID.fullmatch(build_id):
        return make()
    directory = opened(create=True)
    if directory is None:
        return make()
    with directory:
        name = f"{build_id}.{what}"
        digest = _digest(source)
        tables = _load(directory, name, digest)
        if tables is None:
            tables = make()
            # The cache is a convenience: a full disk or a read-only home is no reason to fail.
            with suppress(OSError):
                _store(directory, name, digest, tables)
    return tables


def opened(*, create: bool) -> Directory | None:
    """Open the directory of the cache, or return None if there is none that can be trusted.

    Args:
        create: make it if it does not exist.
    """
    try:
        return Directory.private(cache_directory(), create=create)
    except UntrustedPath as error:
        _warn(f"{error.strerror}: nothing is cached (set XDG_CACHE_HOME to a directory of yours)")
    except (OSError, RuntimeError):  # a read-only home, or no home at all
        pass
    return None


@cache
def _warn(text: str) -> None:
    # Cached, to warn once: each attach opens the directory several times.
    log.warning("%s", text)


def _digest(source: Sequence[bytes]) -> bytes:
    total = hashlib.sha256()
    for piece in source:
        total.update(LENGTH.pack(len(piece)))
        total.update(piece)
    return total.digest()


def _load(directory: Directory, name: str, digest: bytes) -> tuple[Table, ...] | None:
    try:
        data = directory.read(name, MAX_SIZE)
        magic, of, crc, size = HEADER.unpack_from(data)
        body = memoryview(data)[HEADER.size :]
        if (magic, of, crc, size) == (MAGIC, digest, zlib.crc32(body), len(body)):
            return tuple(_tables(body))
        log.info("%s is damaged or of another kernel: it is made again", name)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, struct.error) as error:
        log.info("%s cannot be used (%s): it is made again", name, error)
    return None


def _store(directory: Directory, name: str, digest: bytes, tables: Sequence[Table]) -> None:
    body = b"".join(_packed(table) for table in tables)
    if len(body) > MAX_SIZE - HEADER.size:
        return
    with directory.replacement(name, 0o600) as fresh:
        fresh.file.write(HEADER.pack(MAGIC, digest, zlib.crc32(body), len(body)) + body)
        fresh.put()
    kept = [name for name in directory.names() if "." in name]
    for old in sorted(kept, key=lambda name: _age(directory, name))[KEPT:]:
        directory.remove(old)


def _age(directory: Directory, name: str) -> float:
    return -directory.status(name).st_mtime


def _packed(table: Table) -> bytes:
    data = table.tobytes()
    return table.dtype.str.encode().ljust(8) + LENGTH.pack(len(data)) + data


def _tables(body: memoryview) -> list[Table]:
    # The checksum matched: `_store` wrote these bytes.
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
