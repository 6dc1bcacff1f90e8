"""Divide large requests to the agent into messages of a bounded size."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Final, NamedTuple

from ovr.guest import protocol
from ovr.guest.protocol import Touching

__all__ = ["Files", "Portion", "file_frames", "flat", "touch_requests"]

_FILES_PER_FRAME: Final = 512
_BYTES_PER_TOUCH: Final = 4 << 30
"""Most bytes of several portions in one request, which bounds the time that it takes."""

Files = Mapping[str, bytes | Iterable[bytes]]
"""Contents by file name, whole or in pieces."""


class Portion(NamedTuple):
    """Pages to be touched.

    Attributes:
        pid: of a held task, or of the process of a `MappedObject`; in the guest's initial pid
            namespace.
        how: how they are touched.
        ranges: GVA and size in bytes, whole pages.
    """

    pid: int
    how: Touching
    ranges: Sequence[tuple[int, int]]


def touch_requests(portions: Iterable[Portion]) -> Iterator[protocol.Touch]:
    """Yield the portions as messages, as many as fit into each."""
    heads: list[int] = []
    ranges: list[tuple[int, int]] = []
    size = 0
    for portion in portions:
        for start in range(0, len(portion.ranges), protocol.MAX_RANGES):
            part = portion.ranges[start : start + protocol.MAX_RANGES]
            grown = size + sum(length for _, length in part)
            if ranges and (
                len(ranges) + len(part) > protocol.MAX_RANGES or grown > _BYTES_PER_TOUCH
            ):
                yield protocol.Touch(tuple(heads), flat(ranges))
                heads, ranges, grown = [], [], grown - size
            heads += (portion.pid, int(portion.how), len(part))
            ranges += part
            size = grown
    if ranges:
        yield protocol.Touch(tuple(heads), flat(ranges))


def flat(ranges: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Return the pairs one after the other, as the protocol has them."""
    return tuple(chain.from_iterable(ranges))


def file_frames(images: Files) -> Iterator[protocol.Files]:
    """Yield the files in few frames; large files are split."""
    names: list[str] = []
    pieces: list[bytes] = []
    size = 0
    for name, content in images.items():
        for piece in _pieces(content):
            cost = 4 * len(name) + len(piece) + 16
            if names and (size + cost > protocol.CHUNK or len(names) == _FILES_PER_FRAME):
                yield protocol.Files(tuple(names), tuple(pieces))
                names, pieces, size = [], [], 0
            names.append(name)
            pieces.append(piece)
            size += cost
    if names:
        yield protocol.Files(tuple(names), tuple(pieces))


def _pieces(content: bytes | Iterable[bytes]) -> Iterator[bytes]:
    step = protocol.CHUNK // 2
    parts = (content,) if isinstance(content, bytes) else content
    yield b""  # so that an empty file is created as well
    for part in parts:
        for start in range(0, len(part), step):
            yield part[start : start + step]
