"""Targets: what the agent sends in a dump."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from ovr.attempt.sink import Sink
from ovr.dump.memory import dumped_pages, place
from ovr.dump.output import NewImages
from ovr.dump.received import Fetched, Received
from ovr.dump.rseq import rseq_pages
from ovr.errors import OvrError
from ovr.guest import dump_protocol, move_protocol, protocol
from ovr.guest.wire import encode
from ovr.images import ImageSet
from ovr.images.pagemap import PE_PRESENT, decode_pagemap
from ovr.images.shared import shared_memory
from ovr.lab.agent import LabAgent
from ovr.memory.extents import ends_of
from ovr.memory.ranges import no_ranges
from tests.fuzz.agent import answered, as_input
from tests.fuzz.images import DUMPS, SUITES, dump
from tests.fuzz.patches import patched, sample_patches
from tests.fuzz.target import Input, Target

__all__ = ["TARGETS"]

NAMES = (
    "core-1.img", "pagemap-1.img", "pagemap-shmem-1.img", "pages-1.img", "inventory.img", "parent",
    "../x.img", "a/b.img", "/x.img", ".x.img", "", "x" * 300 + ".img", "x\n.img",
)  # fmt: skip
SMALL = 1 << 12
MOVE = "0" * move_protocol.MOVE_ID


def sent(number: int) -> tuple[list[str], list[bytes]]:
    """Names and contents of the images of a dump that an agent would send."""
    chosen = dump(number)
    both = [
        (name, content)
        for name, content in zip(chosen.names, chosen.contents, strict=True)
        if "pages-" not in name and "/" not in name and len(content) < SMALL
    ]
    return [name for name, _ in both], [content for _, content in both]


def received(data: bytes) -> None:
    """Images of a dump, damaged, in pieces, with more pieces in between."""
    source = Input(data)
    names, contents = sent(source.number())
    more, at, whose = source.number(), source.number(), source.number()
    contents = patched(contents, source)
    pieces = [
        (name, piece)
        for name, content in zip(names, contents, strict=True)
        for piece in (*filter(None, (content[:100], content[100:])), b"")
    ]
    if more:
        pieces.insert(at % len(pieces), (NAMES[whose % len(NAMES)], bytes(more - 1)))
    with tempfile.TemporaryDirectory(prefix="ovr-fuzz-") as name:
        (Path(name) / "images").mkdir()
        try:
            receive(Path(name) / "images", pieces)
        finally:
            assert names_in(name) == ["images"]


def names_in(path: str | Path) -> list[str]:
    return sorted(found.name for found in Path(path).iterdir())


def receive(path: Path, pieces: list[tuple[str, bytes]]) -> None:
    images = NewImages(path)
    into = Received(images, 1 << 30)
    for name, piece in pieces:
        into.save(name, piece)
    into.check_complete()
    assert sorted(into.names) == names_in(path)
    assert not {"parent", "pre-copy-1"} & {*into.names}
    with suppress(OvrError):
        rseq_pages(into.names, images)
    for one in dumped_pages(into.names, images):
        placed = place(
            one, images, lambda one, size: images.sink(one.pages_name, size), no_ranges()
        )
        with placed.sink:
            check(placed.sink, placed.pieces)
        again = decode_pagemap((path / one.name).read_bytes(), one.name).entries
        assert (again["flags"] == PE_PRESENT).all()
        assert again["size"].sum() == one.pagemap.entries["size"].sum()
    with ImageSet.open(path) as opened:
        shared_memory(opened)


def check(sink: Sink, pieces: np.ndarray) -> None:
    """The pieces fill the sink, one after the other."""
    assert (pieces["offset"][1:] == (pieces["offset"] + pieces["size"])[:-1]).all()
    assert (pieces["gva"][1:] >= ends_of(pieces)[:-1]).all()
    assert int(pieces["size"].sum()) == sink.size == os.fstat(sink.fd).st_size


def received_seeds() -> Iterator[bytes]:
    for number in range(len(SUITES) * len(DUMPS)):
        _, contents = sent(number)
        for sample in sample_patches(contents):
            yield bytes([number, 0, 0, 0]) + sample
        for whose in range(len(NAMES)):
            yield bytes([number, whose % 3, 7 * whose, whose])


def dumping(data: bytes) -> None:
    """All that a host does in a dump, with an agent that answers with the input."""
    with tempfile.TemporaryDirectory(prefix="ovr-fuzz-") as name, answered(data) as link:
        path = Path(name) / "images"
        path.mkdir()
        images = NewImages(path)
        into = Received(images, 1 << 30)
        agent = LabAgent(link, 5.0)
        with images.sink("pages-1.img", 16) as sink:
            fetched = Fetched(sink)
            for step in (
                lambda: agent.start_dump(5, {"inventory.img": b"x"}),
                agent.track,
                agent.freeze,
                lambda: agent.track(stop=True),
                lambda: agent.held(into.save),
                into.check_complete,
                lambda: agent.fetch("pages-1.img", fetched.save),
                fetched.check_complete,
                agent.end_dump,
                agent.abort,
                lambda: agent.prepare(MOVE),
                lambda: agent.archive(lambda piece: None),
                agent.doubts,
                lambda: agent.adopt(MOVE),
                lambda: agent.moved(MOVE),
            ):
                with suppress(OvrError):
                    step()
            assert os.fstat(sink.fd).st_size == sink.size
        assert names_in(name) == ["images"]


def dumping_seeds() -> Iterator[bytes]:
    saved = [
        dump_protocol.Saved(name, data)
        for name in ("inventory.img", "core-1.img")
        for data in (b"x" * 20, b"")
    ]
    pages = [dump_protocol.Saved("pages-1.img", data) for data in (b"x" * 16, b"")]
    stopped = protocol.Stopped(5, 6, (5,), 0, "")
    tracked = dump_protocol.Tracked(1000)
    starting = [dump_protocol.Starts(), tracked, dump_protocol.Frozen(), tracked]
    good = [*starting, *saved, stopped, *pages, stopped, dump_protocol.Dumped(b"x")]
    moves = [
        protocol.Aborted("host", "x", True), protocol.Pong(1), move_protocol.Prepared(),
        dump_protocol.Saved(protocol.ENGINE_ARCHIVE, b"x" * 512), dump_protocol.Dumped(b""),
        move_protocol.InDoubt((MOVE, "")), move_protocol.Prepared(),
        move_protocol.Outcome(True, False),
    ]  # fmt: skip
    ends = [
        protocol.Aborted("silent", "x", False), protocol.Failed(1, ("Error (a.c:1): x",), True),
        protocol.Error("busy", "x"), dump_protocol.Saved("../x", b"x"),
    ]  # fmt: skip
    for serial in (False, True):
        for end in range(len(good)):
            for last in ([], *([one] for one in ends)):
                yield as_input([encode(one) for one in [*good[:end], *last]], serial=serial)
        yield as_input([encode(one) for one in good], serial=serial)
        yield as_input([encode(one) for one in [*good, *moves]], serial=serial)


TARGETS = (
    Target("dumped", received_seeds, received),
    Target("dumping", dumping_seeds, dumping),
)
