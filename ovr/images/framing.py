"""Frame and unframe CRIU's image files (``criu/protobuf.c``, ``criu/image.c``, ``magic.h``).

An image of version 1.1 is a common magic, the magic of its type, then entries: a little-endian
32-bit size and that many bytes of protobuf. ``inventory.img`` has only its own magic; service
files (``stats-dump``) have another common magic; in a few images raw bytes follow each entry; some
images are raw altogether.
"""

import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, cast

from google.protobuf.message import DecodeError, Message

from ovr.errors import ImagesDamaged, ImagesUnsupported
from ovr.host import locate
from ovr.images.packed import refuse_packed

__all__ = [
    "DUMP_AGAIN",
    "Frame",
    "check_header",
    "decode",
    "encode",
    "frames",
    "header",
    "image_bytes",
    "is_raw",
    "write_image",
]

COMMON_MAGIC: Final = 0x54564319
SERVICE_MAGIC: Final = 0x55105940
INVENTORY_MAGIC: Final = 0x58313116
DUMP_AGAIN: Final = "copy the images again from where they were dumped, or dump again"

_MAX_FRAMES: Final = 1 << 20
_MAX_ENTRY: Final = 4 << 20  # bytes; two bytes of a nested message take a hundred when decoded
_LARGE: Final = ("MmEntry",)  # one entry for all areas of a task: bounded by their number instead
_MAX_FIELDS: Final = 1 << 20
_MAX_NAMED: Final = 1 << 12  # bytes of an entry whose missing fields are named
_NAMED: Final = 12  # missing fields named at most
_SIZE: Final = struct.Struct("<I")

# Image name without number and suffix, and the magic of its type (image-desc.c, magic.h).
_TYPE_MAGIC: Final = {
    "apparmor": 0x59423047,
    "autofs": 0x49353943,
    "binfmt-misc": 0x67343323,
    "bpfmap-data": 0x64324033,
    "bpfmap-file": 0x57506142,
    "cgroup": 0x59383330,
    "core": 0x55053847,
    "cpuinfo": 0x61404013,
    "creds": 0x54023547,
    "eventfd": 0x44523722,
    "eventpoll": 0x45023858,
    "eventpoll-tfd": 0x44433746,
    "ext-files": 0x59255641,
    "fanotify": 0x55096122,
    "fanotify-mark": 0x56506035,
    "fdinfo": 0x56213732,
    "fifo": 0x58364939,
    "fifo-data": 0x59333054,
    "filelocks": 0x54323616,
    "files": 0x56303138,
    "fs": 0x51403912,
    "ghost-file": 0x52583605,
    "ids": 0x54432030,
    "inetsk": 0x56443851,
    "inotify": 0x48424431,
    "inotify-wd": 0x54562009,
    "ipcns-msg": 0x55453737,
    "ipcns-sem": 0x59573019,
    "ipcns-shm": 0x46283044,
    "ipcns-var": 0x53115007,
    "itimers": 0x57464056,
    "memfd": 0x48453499,
    "mm": 0x57492820,
    "mountpoints": 0x55563928,
    "netdev": 0x57373951,
    "netlinksk": 0x58005614,
    "netns": 0x55933752,
    "ns-files": 0x61394011,
    "packetsk": 0x60454618,
    "pagemap": 0x56084025,
    "pagemap-shmem": 0x56084025,
    "pidns": 0x61157326,
    "pipes": 0x56513555,
    "pipes-data": 0x56453709,
    "posix-timers": 0x52603957,
    "pstree": 0x50273030,
    "reg-files": 0x50363636,
    "remap-fpath": 0x59133954,
    "rlimit": 0x57113925,
    "seccomp": 0x64413049,
    "sigacts": 0x55344201,
    "signal-p": 0x59255647,
    "signal-s": 0x59255647,
    "signalfd": 0x57323820,
    "sk-queues": 0x56264026,
    "tcp-stream": 0x51465506,
    "timens": 0x43114433,
    "timerfd": 0x50493712,
    "tty": 0x59433025,
    "tty-data": 0x59413026,
    "tty-info": 0x59453036,
    "tunfile": 0x57143751,
    "unixsk": 0x54373943,
    "userns": 0x55474906,
    "utsns": 0x54473203,
    "vmas": 0x54123737,
}
_SERVICE: Final = {"irmap-cache": 0x57004059, "stats-dump": 0x57093306, "stats-restore": 0x57093306}
_RAW: Final = frozenset(
    {"ifaddr", "ip6tables", "iptables", "netns-ct", "netns-exp", "nftables", "pages", "pages-shmem"}
    | {"route", "route6", "rule", "tmpfs", "tmpfs-dev"}
)
_KIND_BY_MAGIC: Final = {magic: kind for kind, magic in reversed(_TYPE_MAGIC.items())}

M = TypeVar("M", bound=Message)


class Frame(NamedTuple):
    """One entry of an image: the encoded message and the raw bytes that follow it."""

    payload: bytes
    extra: bytes = b""


def kind_of(name: str) -> str:
    """Return the type part of an image's file name: ``core`` for ``core-17.img``."""
    stem = name.removesuffix(".img").removesuffix(".tar.gz")
    return stem if stem in _TYPE_MAGIC else re.sub(r"-[0-9a-f]+$", "", stem)


def is_raw(name: str) -> bool:
    """Return whether CRIU writes an image of this name without magic and entries."""
    return kind_of(name) in _RAW


def header(name: str) -> bytes:
    """Return the magic numbers that an image of this name begins with.

    Raises:
        ImagesUnsupported: unknown image type.
    """
    kind = kind_of(name)
    if kind == "inventory":
        return _SIZE.pack(INVENTORY_MAGIC)
    if kind in _RAW:
        return b""
    if kind in _SERVICE:
        return _SIZE.pack(SERVICE_MAGIC) + _SIZE.pack(_SERVICE[kind])
    if kind not in _TYPE_MAGIC:
        raise ImagesUnsupported(
            f"{name}: no image type of CRIU 3.17 to 4.2",
            "move the file away if it is not part of the checkpoint, or dump with CRIU 3.17 to 4.2",
        )
    return _SIZE.pack(COMMON_MAGIC) + _SIZE.pack(_TYPE_MAGIC[kind])


def check_header(head: bytes, name: str) -> int:
    """Check the magic numbers at the start of the image `name`; return their length in bytes.

    Raises:
        ImagesDamaged: the file is too short, or holds another type of image.
        ImagesUnsupported: CRIU 3.17 to 4.2 write no such magic.
    """
    wanted = header(name)
    if head[: len(wanted)] == wanted:
        return len(wanted)
    if len(head) < len(wanted):
        raise ImagesDamaged(f"{name}: cut off inside its header ({len(head)} bytes)", DUMP_AGAIN)
    refuse_packed(head, name)
    first = int.from_bytes(head[:4], "little")
    magic = int.from_bytes(head[4:8], "little") if first == COMMON_MAGIC else first
    if first in _KIND_BY_MAGIC:
        raise ImagesUnsupported(
            f"{name}: an image of CRIU before 2.0", "dump with CRIU 3.17 or newer"
        )
    if magic in _KIND_BY_MAGIC:
        raise ImagesDamaged(f"{name}: holds a {_KIND_BY_MAGIC[magic]} image", DUMP_AGAIN)
    raise ImagesUnsupported(
        f"{name}: unknown image magic {magic:#010x}",
        "is this a CRIU image? If it is damaged or of a newer CRIU, dump with CRIU 3.17 to 4.2",
    )


def frames(data: bytes, name: str, extra: Callable[[bytes], int] | None = None) -> Iterator[Frame]:
    """Yield the entries of the image `name`.

    Args:
        data: the whole file.
        name: its file name, which determines the expected magic.
        extra: for images with raw bytes after each entry: returns their number for a payload.

    Raises:
        ImagesDamaged: the file is truncated, or a size exceeds it.
        ImagesUnsupported: the magic is unknown.
    """
    position = check_header(data, name)
    for _ in range(_MAX_FRAMES):
        if position == len(data):
            return
        payload, position = _take(data, position + 4, _size_at(data, position, name), name)
        rest, position = _take(data, position, extra(payload) if extra else 0, name)
        yield Frame(payload, rest)
    raise ImagesDamaged(f"{name}: more than {_MAX_FRAMES} entries", DUMP_AGAIN)


def _size_at(data: bytes, position: int, name: str) -> int:
    if position + 4 > len(data):
        raise ImagesDamaged(f"{name}: cut off at byte {len(data)}", DUMP_AGAIN)
    size: int = _SIZE.unpack_from(data, position)[0]
    return size


def _take(data: bytes, position: int, size: int, name: str) -> tuple[bytes, int]:
    if size > len(data) - position:
        raise ImagesDamaged(
            f"{name}: {size} bytes needed at byte {position}, {len(data) - position} present",
            DUMP_AGAIN,
        )
    return data[position : position + size], position + size


def image_bytes(name: str, entries: Iterable[Frame]) -> bytes:
    """Return the content of an image with these entries: the reverse of `frames`."""
    parts = [header(name)]
    for payload, extra in entries:
        parts += _SIZE.pack(len(payload)), payload, extra
    return b"".join(parts)


def decode(kind: type[M], payload: bytes, name: str) -> M:
    """Decode one entry of the image `name`.

    Raises:
        ImagesDamaged: not a message of this kind, a required field is missing, or the entry is
            larger than such an entry can be.
    """
    if len(payload) > _MAX_ENTRY and not (
        kind.__name__ in _LARGE and _fields(payload) <= _MAX_FIELDS
    ):
        raise ImagesDamaged(
            f"{name}: an entry of {len(payload)} bytes, too much for a {kind.__name__}", DUMP_AGAIN
        )
    message = kind()
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise ImagesDamaged(f"{name}: cannot be decoded as {kind.__name__}", DUMP_AGAIN) from error
    if not message.IsInitialized():
        raise ImagesDamaged(
            f"{name}: {kind.__name__} without {_missing(message, len(payload))}", DUMP_AGAIN
        )
    return message


def _missing(message: Message, size: int) -> str:
    if size > _MAX_NAMED:  # nested messages could have millions of them
        return "a required field"
    return ", ".join(cast("Any", message).FindInitializationErrors()[:_NAMED])


def _fields(payload: bytes) -> int:
    # Number of fields of the encoded message, without nested ones.
    count = at = 0
    try:
        while at < len(payload) and count <= _MAX_FIELDS:
            tag, at = _varint(payload, at)
            match tag & 7:
                case 0:
                    _, at = _varint(payload, at)
                case 2:
                    size, at = _varint(payload, at)
                    at += size
                case fixed:
                    at += {1: 8, 5: 4}[fixed]
            count += 1
    except (KeyError, IndexError, ValueError):
        return _MAX_FIELDS + 1
    return count


def _varint(payload: bytes, at: int) -> tuple[int, int]:
    # The number at `at`, and the position after it.
    value = shift = 0
    while payload[at] & 0x80:
        value |= (payload[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if shift > 63:
            raise ValueError("longer than ten bytes")
    return value | payload[at] << shift, at + 1


def encode(message: Message) -> Frame:
    """Return the message as an entry without raw bytes."""
    return Frame(message.SerializeToString(deterministic=True))


def write_image(directory: Path, name: str, chunks: Iterable[bytes]) -> None:
    """Write the file `name` atomically: it appears complete, or not at all.

    Raises:
        OSError: it cannot be written, or the directory is not this user's or root's.
    """
    place, name = locate(directory / name)
    with place, place.replacement(name, 0o600) as fresh:
        fresh.file.writelines(chunks)
        fresh.file.flush()
        os.fsync(fresh.file.fileno())
        fresh.put()
