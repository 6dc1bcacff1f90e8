"""Find the terminals of a tree whose other end is not in its images.

A shell job has the slave of a pseudo terminal whose master belongs to sshd, tmux or the like. On
restore, CRIU replaces that slave by its own standard input (``pty_open_unpaired_slave`` in
criu/tty.c), which must be the terminal of the shell that CRIU was started from. An agent has none.
Consoles, virtual and serial terminals are opened by their paths; a slave whose master is in the
images gets that one; one that was hung up gets a master without a reader.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ovr.errors import ImagesUnsupported
from ovr.images.imageset import ImageSet
from ovr.images.objects import FdinfoEntry, FileEntry, TtyFileEntry, TtyInfoEntry

__all__ = ["Terminal", "outside_terminals", "refuse_outside_terminals"]

_TYPE_PTY: Final = 1  # TtyType in images/tty.proto
_TYPE_EXTERNAL: Final = 5
_SLAVE_MAJOR: Final = 136  # UNIX98_PTY_SLAVE_MAJOR in linux/major.h
_SHOWN: Final = 4  # descriptors in a message

_WAY_OUT: Final = (
    "dump the program with the terminal's owner (sshd, tmux, script), or started without one"
    " (setsid PROGRAM </dev/null >LOG 2>&1); on a terminal of the guest, `criu restore --shell-job`"
    " restores these images"
)


@dataclass(frozen=True)
class Terminal:
    """A terminal whose other end is not in the images.

    Attributes:
        name: its path, or CRIU's name for an external terminal.
        users: pid and descriptor of each opening.
    """

    name: str
    users: Sequence[tuple[int, int]]


def outside_terminals(images: ImageSet) -> Iterator[Terminal]:
    """Yield the terminals that CRIU can only restore from a shell on a terminal, or not at all.

    As ``tty_find_restoring_task`` of criu/tty.c finds them.

    Raises:
        ImagesDamaged, ImagesUnsupported: the images contradict themselves.
    """
    opened = [
        entry.tty for entry in images.entries("files.img", FileEntry) if entry.HasField("tty")
    ]
    used = {file.tty_info_id for file in opened}
    infos = {
        info.id: info
        for info in images.entries("tty-info.img", TtyInfoEntry)
        if info.id in used
    }  # fmt: skip
    for number, info in infos.items():
        if name := _outside(info, infos.get(number + 1)):
            files = [file for file in opened if file.tty_info_id == number]
            yield Terminal(name, _users(images, files))


def refuse_outside_terminals(images: ImageSet) -> None:
    """Raise if the tree has a terminal whose other end is not in the images.

    Raises:
        ImagesUnsupported: it has one.
        ImagesDamaged: the images contradict themselves.
    """
    for terminal in outside_terminals(images):
        raise ImagesUnsupported(
            f"{_where(terminal)} the terminal {terminal.name}, whose other end is not in the"
            " images: CRIU would use the terminal it is run from, and the agent has none",
            _WAY_OUT,
        )


def _outside(info: TtyInfoEntry, master: TtyInfoEntry | None) -> str:
    # The terminal's name; empty if its other end is in the images. The slave of a pair has number
    # 2 * index, the master 2 * index + 1 (tty_gen_id). A terminal without termios was hung up.
    if info.type == _TYPE_EXTERNAL:
        return f"tty[{info.rdev:x}:{info.dev:x}]"
    slave = info.type == _TYPE_PTY and os.major(info.rdev) == _SLAVE_MAJOR
    if not slave or not info.HasField("termios"):
        return ""
    paired = master is not None and master.type == _TYPE_PTY and master.HasField("termios")
    return "" if paired else f"/dev/pts/{info.pty.index}"


def _users(images: ImageSet, files: Sequence[TtyFileEntry]) -> list[tuple[int, int]]:
    numbers = {file.id for file in files}
    found = []
    for task in images.tasks:
        if task.alive:
            image = f"fdinfo-{images.ids(task).files_id}.img"
            descriptors = images.entries(image, FdinfoEntry)
            found += [(task.pid, each.fd) for each in descriptors if each.id in numbers]
    return found


def _where(terminal: Terminal) -> str:
    if not terminal.users:
        return "the tree has"
    pid = terminal.users[0][0]
    descriptors = [str(fd) for user, fd in terminal.users if user == pid]
    more = ", …" if len(descriptors) > _SHOWN else ""
    return f"fd {', '.join(descriptors[:_SHOWN])}{more} of pid {pid} is"
