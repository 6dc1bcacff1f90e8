"""Terminals of shell jobs: what CRIU could only take from a shell is refused, and nothing else."""

import pytest

from ovr.checkpoint import open_checkpoint
from ovr.errors import ImagesUnsupported
from ovr.images import ImageSet
from ovr.images.framing import decode, encode, frames, image_bytes
from ovr.images.objects import FileEntry, TtyInfoEntry
from ovr.images.terminals import Terminal, outside_terminals
from ovr.images.wire import copy_of

PTMX, SLAVE, VT, SERIAL, CONSOLE, CTTY = 0x502, 0x8803, 0x401, 0x440, 0x501, 0x500
PTY_TYPE, CONSOLE_TYPE, VT_TYPE, CTTY_TYPE, EXTERNAL_TYPE, SERIAL_TYPE = range(1, 7)
INDEX = 3


def terminal(number, rdev, kind=PTY_TYPE, *, hung=False):
    info = TtyInfoEntry(
        id=number, type=kind, locked=False, exclusive=False, packet_mode=False, sid=1, pgrp=1,
        rdev=rdev, dev=0x18,
    )  # fmt: skip
    if kind == PTY_TYPE:
        info.pty.index = INDEX
    if not hung:
        for field in ("iflag", "oflag", "cflag", "lflag", "line", "ispeed", "ospeed"):
            setattr(info.termios, f"c_{field}", 0)
    return info


def give(directory, *infos):
    """Let the first regular files of the dump be openings of these terminals."""
    path = directory / "files.img"
    files = [
        decode(FileEntry, frame.payload, "files.img")
        for frame in frames(path.read_bytes(), "files.img")
    ]
    regular = [file for file in files if file.HasField("reg") and file.id in (5, 6)]
    for file, info in zip(regular, infos, strict=False):
        fown = copy_of(file.reg.fown)
        file.ClearField("reg")
        file.type, file.tty.id, file.tty.tty_info_id, file.tty.flags = 11, file.id, info.id, 2
        file.tty.fown.CopyFrom(fown)
    path.write_bytes(image_bytes("files.img", map(encode, files)))
    (directory / "tty-info.img").write_bytes(image_bytes("tty-info.img", map(encode, infos)))
    return directory


SLAVE_OF_OTHERS = (terminal(2 * INDEX, SLAVE),)
REFUSED = {
    "a slave without its master": (SLAVE_OF_OTHERS, "/dev/pts/3"),
    "a slave whose master was hung up": (
        (*SLAVE_OF_OTHERS, terminal(2 * INDEX + 1, PTMX, hung=True)), "/dev/pts/3"
    ),
    "a slave and the master of another": (
        (*SLAVE_OF_OTHERS, terminal(2 * INDEX + 3, PTMX)), "/dev/pts/3"
    ),
    "an external one": ((terminal(8, SLAVE, EXTERNAL_TYPE),), "tty[8803:18]"),
}  # fmt: skip
TAKEN = {
    "no terminal": (),
    "both ends": (*SLAVE_OF_OTHERS, terminal(2 * INDEX + 1, PTMX)),
    "a master alone": (terminal(2 * INDEX + 1, PTMX),),
    "a slave that was hung up": (terminal(2 * INDEX, SLAVE, hung=True),),
    "a virtual terminal": (terminal(2008, VT, VT_TYPE),),
    "a serial one": (terminal(2010, SERIAL, SERIAL_TYPE),),
    "the console": (terminal(2004, CONSOLE, CONSOLE_TYPE),),
    "/dev/tty": (terminal(2012, CTTY, CTTY_TYPE),),
}


@pytest.mark.parametrize("options", [(), ("--shell-job",)])
@pytest.mark.parametrize("what", REFUSED)
def test_refused(one, what, options):
    infos, name = REFUSED[what]
    give(one, *infos)
    with pytest.raises(ImagesUnsupported, match="whose other end is not in the images") as caught:
        open_checkpoint(one, criu_options=options)
    assert f" is the terminal {name}, " in str(caught.value)
    assert str(caught.value).startswith("fd ")
    assert "setsid" in caught.value.hint
    assert "criu restore --shell-job" in caught.value.hint


@pytest.mark.parametrize("what", TAKEN)
def test_taken(one, what):
    with open_checkpoint(give(one, *TAKEN[what]), criu_options=("--shell-job",)) as checkpoint:
        assert checkpoint.options == ("--shell-job",)
        assert not [*outside_terminals(checkpoint.images)]


def test_one_that_no_task_has_open_is_no_matter(one):
    give(one)
    infos = map(encode, SLAVE_OF_OTHERS)
    (one / "tty-info.img").write_bytes(image_bytes("tty-info.img", infos))
    with open_checkpoint(one):
        pass


def test_who_has_it(one):
    with ImageSet.open(give(one, *SLAVE_OF_OTHERS)) as images:
        [found] = outside_terminals(images)
        pid = images.tasks[0].pid
    assert isinstance(found, Terminal)
    assert {user for user, _ in found.users} == {pid}


def test_an_engine_has_terminals_of_its_own(one):
    given = {"runtime": "runc", "bundle": "/srv/web", "name": "web"}
    with open_checkpoint(give(one, *SLAVE_OF_OTHERS), **given) as checkpoint:
        assert [*outside_terminals(checkpoint.images)]
