"""Damage to what is sound: an input says where, and what stands there then."""

import struct
from collections.abc import Iterator, Sequence

from tests.fuzz.target import Input

__all__ = ["patch", "patched", "sample_patches"]

_HEAD = struct.Struct("<BHB")  # kind and part, place, size
KINDS = 8
MOST = 64


def patched(parts: Sequence[bytes], data: Input) -> list[bytes]:
    """Return `parts`, damaged as the input says."""
    damaged = list(parts)
    for _ in range(MOST):
        if not data:
            break
        which = data.number() % len(damaged)
        kind, at, size = data.number(), data.number(2), data.number()
        damaged[which] = _one(damaged[which], kind % KINDS, at, size, data)
    return damaged


def _one(  # noqa: PLR0911 - one for each kind
    part: bytes, kind: int, at: int, size: int, data: Input
) -> bytes:
    at = at % (len(part) + 1)
    match kind:
        case 0 | 1:  # other bytes
            new = data.bytes(size)
            return part[:at] + new + part[at + len(new) :]
        case 2:  # more bytes
            return part[:at] + data.bytes(size) + part[at:]
        case 3:  # fewer
            return part[:at] + part[at + size :]
        case 4:
            return part[:at]
        case 5:  # one bit
            flipped = bytes([part[at] ^ 1 << size % 8]) if at < len(part) else b""
            return part[:at] + flipped + part[at + 1 :]
        case 6:  # extreme numbers
            new = (b"\xff" * 8, b"\0" * 8, b"\x7f".rjust(8, b"\xff"), b"\x80".rjust(8, b"\0"))
            return part[:at] + new[size >> 6] + part[at + 8 :]
        case _:  # something twice
            return part[: at + size] + part[at : at + size] + part[at + size :]


def patch(which: int, kind: int, at: int, content: bytes = b"") -> bytes:
    """The input for one piece of damage."""
    return bytes([which, kind]) + struct.pack("<HB", at, len(content)) + content


def sample_patches(parts: Sequence[bytes]) -> Iterator[bytes]:
    """A few inputs to begin with: none, and one of each kind in the middle of each part."""
    yield b""
    for which, part in enumerate(parts):
        for kind in range(KINDS):
            yield patch(which, kind, len(part) // 2, b"\1\2")
