"""Inputs to begin with: made here, and found by earlier runs (``corpus/TARGET.tar.xz``)."""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ovr.guest import protocol
from ovr.guest.wire import encode
from tests.fuzz.agent import samples
from tests.fuzz.targets import TARGETS

__all__ = ["CORPUS", "C_SEEDS", "pack", "seeds", "unpack", "write"]

CORPUS = Path(__file__).parent / "corpus"


def unpack(target: str) -> list[bytes]:
    """The inputs kept of a target's earlier runs, and those that once failed."""
    archive = CORPUS / f"{target}.tar.xz"
    if not archive.exists():
        return []
    with tarfile.open(archive) as tar:
        return [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]


def pack(target: str, inputs: Iterable[bytes]) -> None:
    """Keep inputs for later runs; the same inputs make the same archive."""
    CORPUS.mkdir(exist_ok=True)
    with tarfile.open(CORPUS / f"{target}.tar.xz", "w:xz") as tar:
        for data in sorted(set(inputs)):
            member = tarfile.TarInfo(_name(data))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def seeds(target: str) -> list[bytes]:
    """All inputs that a target begins with."""
    made = C_SEEDS[target]() if target in C_SEEDS else TARGETS[target].seeds()
    return [*made, *unpack(target)]


def write(directory: Path, inputs: Iterable[bytes]) -> None:
    """Put inputs into a directory, each in a file of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    for data in inputs:
        (directory / _name(data)).write_bytes(data)


def _name(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()[:16]


# ---- for the targets in C ----------------------------------------------------------------


def _messages() -> Iterator[bytes]:
    for message in samples():
        yield b"\x40" + encode(message)[4:]


def _ranges() -> Iterator[bytes]:
    for message in (
        protocol.Touch((1, 1, 1, 2, 0, 1), (0, 4096, 8192, 8192)),
        protocol.Map(1, "fd/3", 1 << 20, (0, 4096, 4096, 4096)),
    ):
        yield b"\0" + encode(message)[4:]
    yield bytes([1, 0, 4, 1, 0, 1, 0, 2, 0, 3, 0, 4])
    yield bytes([1, 1, 2, 1, 0, 9, 0, 1, 0, 2])


def _names() -> Iterator[bytes]:
    for names in (["a.img", "b.img", "a.img"], ["..", ".x", "../x", "/etc/x"], ["x" * 254]):
        yield b"".join(bytes([len(n)]) + n.encode() + b"\0\4data" for n in names)


def _sessions() -> Iterator[bytes]:
    bodies = [encode(message)[4:] for message in samples()]
    steps = [b"\1" + len(body).to_bytes(2, "big") + body for body in bodies if len(body) < 2048]
    for link in range(3):
        begin = bytes([link]) + (b"\2\x90\3" if link else b"")
        yield begin
        for step in steps:
            yield begin + b"\4" + step + b"\5"
        yield begin + b"\4" + b"".join(steps[:12]) + b"\5\7"


def _restores() -> Iterator[bytes]:
    # As in c/restore.c: what the host says, the hook's coming and its end, CRIU's end, time.
    files, begin, touch, go, abort = (bytes([0, op, 1]) for op in (0, 1, 2, 4, 5))
    begin = begin[:2] + b"\xff\2"
    asked, held, hook_ends, criu_ends = b"\2\0", b"\2\1", b"\3", b"\4\0"
    start = files + begin + asked + hook_ends + held
    yield start + touch + go + hook_ends + criu_ends + start + abort
    for late in (criu_ends, hook_ends, b"\5\xff", b"\6", b"\x80" + go[1:], b"\4\1"):
        yield start + late + go
        yield start + go + late
        yield files + begin + late + held + go
    yield files + begin + b"\2\5" + b"\2\2" + b"\2\x11"
    dump, track, fetch = b"\0\6\xff\2", b"\0\7\1", b"\0\x08\1"
    start = track + files + dump + 2 * (asked + hook_ends) + held
    second, killed, no_room, criu_killed = hook_ends + held + hook_ends, b"\x0b", b"\x47", b"\x0c"
    for late in (
        b"",
        b"\0\2\x05",
        b"\0\2\x25",
        fetch + b"\7",
        no_room + fetch + no_room,
        abort,
        b"\6",
        b"\5\xff",
    ):
        yield start + late + go + second + criu_ends + start + abort + second + b"\4\1"
        yield start + late + killed + held + hook_ends + b"\4\1"
        yield start + late + criu_killed + hook_ends + start
        yield start + late + go + killed + held + hook_ends + criu_ends
    # An engine, which ends after its CRIU, or is killed before.
    by_engine, engine_ends, engine_killed = b"\0\6\xff\6\3", b"\x24", b"\x34"
    saved = held + b"\7\7"  # all images are with the host
    start = track + files + by_engine + 2 * (asked + hook_ends) + saved
    over = criu_ends + engine_ends
    for late in (b"", fetch + b"\7", no_room + fetch + no_room, abort, b"\6", b"\5\xff"):
        yield start + late + go + second + over + start + abort + second + over
        yield start + late + killed + held + hook_ends + over
        yield start + late + criu_killed + hook_ends + engine_ends + start
        yield start + late + engine_killed + second + criu_ends + start
        yield start + late + go + engine_killed + second + criu_ends
        yield start + late + go + second + criu_ends + no_room + b"\x64" + b"\5\xff"
        yield start + late + go + criu_killed + hook_ends + engine_ends
    for name in (1, 7, 0x13, 0x1B):
        yield files + by_engine[:-1] + bytes([name]) + asked
    for ends in (engine_ends, engine_killed, abort + over):
        yield files + by_engine + ends + asked + over
    for ends in (criu_killed, b"\5\xff\5\xff\5\xff\7" + criu_ends):
        yield files + dump + asked + abort + ends + files + dump + held


def _moves() -> Iterator[bytes]:
    # The same, of a dump whose tree is prepared, and of a move in doubt of an earlier agent.
    prepare, adopt, doubts, moved = (bytes([0, 240 + op, 0]) for op in range(4))
    go, abort, gone, other = b"\0\4\1", b"\0\5\1", b"\6", b"\x80"
    asked, held, hook_ends, hook_killed = b"\2\0", b"\2\1", b"\3", b"\x0b"
    files, criu_ends, criu_killed, late = b"\0\0\1", b"\4\0", b"\x0c", b"\5\xff"
    dump, track, tracked, turns = b"\0\6\xff\2", b"\0\7\1", b"\x0f", b"\7\7\7"
    own = files + dump + asked + track + tracked + hook_ends + held + turns
    second = hook_ends + held + hook_ends + criu_ends
    for number in range(3):
        start = own + prepare[:2] + bytes([number])
        for happens in (b"", late, gone, hook_killed + held, hook_ends, criu_killed):
            for decided in (go, abort):
                yield start + happens + decided + second
                again = other + adopt[1:2] + bytes([number])
                yield start + happens + gone + doubts + again + other + decided[1:] + second
    yield from _moved_containers()
    earlier, earlier_with_criu = b"\x27", b"\x37"
    podmans, removed, not_removed = b"\x3f", b"\4", b"\x0c"
    for decided in (go + removed, go + not_removed + go + removed, go + gone + removed, abort):
        yield podmans + doubts + adopt + decided + earlier + moved
    for start in (earlier, earlier_with_criu, earlier_with_criu + earlier):
        for decided in (go, abort, gone + adopt + go, b"\x40" + go[1:] + b"\x47\x45\xff"):
            yield start + doubts + adopt + decided + earlier + moved
    arrival = files + b"\0\1\x13\2" + asked + hook_ends + held
    for decided in (go + hook_ends + criu_ends, abort, hook_killed + go):
        yield arrival + moved + decided + moved


def _moved_containers() -> Iterator[bytes]:
    # A container whose tree is prepared: its archive, its removal.
    prepare, adopt, doubts, _, archive = (bytes([0, 240 + op, 0]) for op in range(5))
    go, abort, gone, other, late = b"\0\4\1", b"\0\5\1", b"\6", b"\x80", b"\5\xff"
    asked, held, hook_ends, hook_killed = b"\2\0", b"\2\1", b"\3", b"\x0b"
    files, criu_ends, criu_killed, tracked = b"\0\0\1", b"\4\0", b"\x0c", b"\x0f"
    engine_ends, engine_fails, engine_killed = b"\x24", b"\x2c", b"\x34"
    removed, not_removed, unread = b"\4", b"\x0c", b"\x47"
    dump = files + b"\0\6\xff\6\x23" + asked + b"\0\7\1" + tracked + hook_ends + held
    second = hook_ends + held + hook_ends
    packed = second + criu_ends + engine_ends
    start = dump + b"\7\7\7" + prepare
    again = gone + doubts + other + adopt[1:]
    for ends in (packed, second + criu_ends + engine_fails, second + criu_killed + engine_fails,
                 second + engine_killed + criu_ends, criu_killed + engine_fails,
                 hook_killed + held + hook_ends + criu_ends + engine_ends):  # fmt: skip
        for decided in (go + removed, go + not_removed + go + removed, abort, go + late + removed):
            yield start + archive + ends + decided + dump
            yield start + archive + gone + ends + other + adopt[1:] + other + decided[1:] + removed
            yield start + again + other + archive[1:] + ends + other + decided[1:] + removed
    for late_word in (abort, go, archive, late, gone, unread + late):
        yield start + archive + late_word + packed + other + adopt[1:] + other + abort[1:]
        yield start + archive + second + late_word + criu_ends + late + engine_ends + dump
        yield start + late_word + packed + late_word
        yield start + archive + packed + go + late_word + removed + dump


C_SEEDS = {
    "agent-message": _messages,
    "agent-ranges": _ranges,
    "agent-images": _names,
    "agent-restore": lambda: [*_restores(), *_moves()],
    "agent-session": _sessions,
}
