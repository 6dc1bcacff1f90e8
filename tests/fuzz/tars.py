"""Targets: tars whose headers have the right checksums, so that what they say is looked at."""

import gzip
import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ovr.checkpoint.tar import BLOCK, Member, read_members
from ovr.checkpoint.unpack import open_tar
from ovr.errors import OvrError
from tests.fuzz.target import Input, Target
from tests.unit.images.tars import END, container, head, long_name, member, pax, record, sealed

__all__ = ["TARGETS", "resealed"]

LARGEST = 1 << 20
NAMES = ("a", "checkpoint/core-1.img", "./b", "n" * 120, "../c", "d/")
SIZES = (b"0", b"512", b"-512", b"-5", b"99999999999999999999", b"1", b" 7", b"0x9", b"1_0")
KINDS = b"0\x001234567LKxXgSVMDA\xff"


def resealed(data: bytes, offsets: list[int]) -> bytes:
    """Give the headers at these places the checksums that they should have."""
    for at in offsets:
        if len(data) >= at + BLOCK:
            data = data[:at] + sealed(data[at : at + BLOCK]) + data[at + BLOCK :]
    return data


def _content(source: Input) -> bytes:
    return bytes(source.number(2) % 2048)


def _kind(source: Input) -> bytes:
    at = source.number() % len(KINDS)
    return KINDS[at : at + 1]


def _name(source: Input) -> str:
    return NAMES[source.number() % len(NAMES)]


def _size(source: Input) -> bytes:
    return SIZES[source.number() % len(SIZES)]


PARTS: tuple[Callable[[Input], bytes], ...] = (
    lambda source: member(_name(source), _content(source)),
    lambda source: member(_name(source), _content(source), _kind(source)),
    lambda source: head(_name(source), kind=_kind(source), field=source.bytes(12) or b"\0"),
    lambda source: pax(record("path", _name(source))),
    lambda source: pax(record("size", _size(source).decode())),
    lambda source: pax(source.bytes(source.number())),
    lambda source: pax(record("comment", "x"), kind=_kind(source)),
    lambda source: long_name(_name(source), _kind(source)),
    lambda source: sealed(source.bytes(BLOCK).ljust(BLOCK, b"\0")),
    lambda source: source.bytes(source.number()),
    lambda _: container(),
    lambda source: pax(record("linkpath", _name(source))) + head(_name(source), kind=_kind(source)),
    lambda _: END,
)


def _made(source: Input) -> bytes:
    """A tar of parts, the last of which may be there up to 256 times."""
    made = bytearray()
    while source and len(made) < LARGEST:
        step = source.number()
        part = PARTS[step % len(PARTS)](source)
        made += part * (source.number() + 1 if step >= 240 else 1)
    return bytes(made[:LARGEST])


class _Memory:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def read(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def skip(self, size: int) -> int:
        return len(self.read(size))


def tar(data: bytes) -> None:
    """Accepted members do not overlap, and tarfile reads the same."""
    made = _made(Input(data))
    found = read_members(_Memory(made), Path("x"))
    at = 0
    for one in found.values():
        assert one.offset == at < one.offset_data <= one.end <= len(made)
        assert 0 <= one.size <= one.end - one.offset_data < one.size + BLOCK
        at = one.end
    with tarfile.open(fileobj=io.BytesIO(made), mode="r:", errorlevel=2) as theirs:
        placed = [each.offset_data for each in theirs]  # its offsets leave out global headers
        sizes = [each.size for each in theirs if each.isreg()]
        targets = [each.linkname for each in theirs if each.issym()]
    assert [one.offset_data for one in found.values()] == placed
    assert [one.size for one in found.values() if one.is_file] == sizes
    assert [one.link for one in found.values() if one.is_symlink] == targets


def unpacked(data: bytes) -> None:
    """A packed tar is the same as one that is not, or is refused for the same reason."""
    source = Input(data)
    damage = source.bytes(2)
    made = _made(source)
    packed = bytearray(gzip.compress(made, 1, mtime=0))
    if damage[:1] > b"\x80":
        packed[10 + damage[-1] % (len(packed) - 10)] ^= 1 + damage[0] % 128
    plain = _outcome(made)
    ours = _outcome(bytes(packed))
    if damage[:1] <= b"\x80" and made[257:262] == b"ustar":
        assert ours == plain
    if isinstance(ours, str):
        raise OvrError(ours)


def _outcome(data: bytes) -> dict[str, Member] | str:
    with tempfile.NamedTemporaryFile(prefix="ovr-fuzz-") as file:
        file.write(data)
        file.flush()
        try:
            fd, members = open_tar(Path(file.name))
        except OvrError as error:
            return str(error).replace(file.name, "x")
        os.close(fd)
        return members


def tar_seeds() -> Iterator[bytes]:
    end = bytes([len(PARTS) - 1])
    for number in range(len(PARTS)):
        for rest in (b"", b"\1\1\1\1", bytes(range(20))):
            yield bytes([number]) + rest + end
            yield bytes([0, 0, 9, 0, number]) + rest + bytes([0, 0, 1, 0]) + end
        yield bytes([240 + number]) + b"\0\0\0\0\xff" + end
    for kind in range(len(KINDS)):
        yield bytes([1, 0, 5, 0, kind]) + end
        yield bytes([6, kind, 0, 0, 5, 0]) + end
    for size in range(len(SIZES)):
        yield bytes([4, size, 0, 0, 5, 0]) + end


def unpacked_seeds() -> Iterator[bytes]:
    for number, seed in enumerate(tar_seeds()):
        if number % 4 == 0:
            yield b"\0\0" + bytes([10]) + seed
    for place in range(0, 250, 50):
        yield bytes([0x90, place, 10, len(PARTS) - 1])


TARGETS = (
    Target("tar", tar_seeds, tar),
    Target("unpacked", unpacked_seeds, unpacked),
)
