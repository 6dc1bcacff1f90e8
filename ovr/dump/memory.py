"""Which pages the host reads, and where they go in the pages images.

CRIU has dumped the tree with a parent image set of ours: its pagemaps list every page of each
task, those that it has written itself as present, all others as the parent's. The latter are read
from the VM's RAM. What CRIU has written is newer than the parent, so it is taken as it is.
"""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import numpy as np

from ovr._fastcopy import PIECE
from ovr.attempt.alive import Alive
from ovr.attempt.sink import Sink
from ovr.attempt.targets import Target
from ovr.dump.output import Output, writable
from ovr.errors import ImagesDamaged
from ovr.guest.client.agent import Agent
from ovr.guest.client.requests import Portion
from ovr.guest.protocol import Touching
from ovr.images.pagemap import (
    PE_PARENT,
    PE_PRESENT,
    Pagemap,
    check_pages_size,
    decode_pagemap,
    encode_pagemap,
    offsets_of,
)
from ovr.kernel import mm_space, types_that_fit
from ovr.memory.extents import Extents, ends_of, total
from ovr.state import GuestTree

__all__ = ["TaskPages", "place_pages", "targets_of"]

_PAGEMAP: Final = re.compile(r"pagemap-(?:shmem-)?(\d+)\.img")


@dataclass(frozen=True)
class TaskPages:
    """The pages of one task that the host reads.

    Attributes:
        pid: its pid, in the pid namespace of the tree.
        sink: its pages image, with what CRIU has written in its place.
        pieces: the pages to be read, a `_fastcopy.PIECE` array; offsets are positions in `sink`.
        inside: bytes that CRIU has written.
    """

    pid: int
    sink: Sink
    pieces: Extents
    inside: int


def place_pages(output: Output, stack: ExitStack) -> list[TaskPages]:
    """Write the final pagemaps, and make room for the pages of the parent.

    Args:
        output: CRIU's images.
        stack: closes the sinks.

    Raises:
        ImagesDamaged: CRIU's images are invalid.
        UsageError: the files cannot be written.
    """
    found = []
    owner: dict[int, str] = {}
    for name in output.names():
        match = _PAGEMAP.fullmatch(name)
        if not match:
            continue
        pagemap = decode_pagemap(output.read(name), name)
        if owner.setdefault(pagemap.pages_id, name) != name:
            raise ImagesDamaged(f"{name} has the same pages image as {owner[pagemap.pages_id]}")
        from_parent = pagemap.entries["flags"] & PE_PARENT != 0
        if not from_parent.any():
            continue
        if "shmem" in name:
            raise ImagesDamaged(f"{name}: shared memory with pages of a parent")
        found.append(_place(output, stack, name, int(match[1]), pagemap))
    return found


def _place(output: Output, stack: ExitStack, name: str, pid: int, pagemap: Pagemap) -> TaskPages:
    theirs = pagemap.entries["flags"] & PE_PRESENT != 0
    placed = pagemap.entries.copy()
    placed["flags"] = PE_PRESENT
    placed["offset"] = offsets_of(placed)
    pages_name = f"pages-{pagemap.pages_id}.img"
    criu = output.take(pages_name)
    stack.callback(os.close, criu)
    check_pages_size(pagemap, os.fstat(criu).st_size, pages_name)
    sink = stack.enter_context(output.sink(pages_name, total(placed)))
    with writable(output.path / pages_name):
        for start, size, target in zip(
            pagemap.entries["offset"][theirs].tolist(),
            placed["size"][theirs].tolist(),
            placed["offset"][theirs].tolist(),
            strict=True,
        ):
            _copy_range(criu, start, size, sink.fd, target)
    output.replace(
        name, encode_pagemap(Pagemap(pagemap.pages_id, _joined(placed), pagemap.compat), name)
    )
    pieces = np.empty(np.count_nonzero(~theirs), dtype=PIECE)
    for field in ("gva", "size", "offset"):
        pieces[field] = placed[field][~theirs]
    return TaskPages(pid, sink, pieces, total(placed[theirs]))


def _copy_range(source: int, start: int, size: int, target: int, at: int) -> None:
    while size:
        data = os.pread(source, min(size, 1 << 20), start)
        if not data:
            raise ImagesDamaged("a pages image of the guest's CRIU was cut off")
        done = os.pwrite(target, data, at)
        start, at, size = start + done, at + done, size - done


def _joined(entries: Extents) -> Extents:
    # Neighbours are one entry, as in a dump without a parent.
    if not len(entries):
        return entries
    first = np.append(True, entries["gva"][1:] != ends_of(entries)[:-1])
    joined: Extents = entries[first].copy()
    joined["size"] = np.add.reduceat(entries["size"], np.flatnonzero(first))
    return joined


def targets_of(tasks: list[TaskPages], guest: GuestTree, agent: Agent) -> Iterator[Target]:
    """Yield the pages of each task with the address space that has them.

    Args:
        tasks: the tasks.
        guest: the held tree.
        agent: asked for pages that are not in memory.

    Raises:
        AttemptFailed: a task is not there.
        GuestFault: invalid kernel objects in the guest.
        KernelNotFound: invalid types of its kernel.
    """
    for one in tasks:
        yield _target(one, guest, agent)


@types_that_fit()
def _target(pages: TaskPages, guest: GuestTree, agent: Agent) -> Target:
    task = guest.task(pages.pid)
    space = mm_space(guest.kernel, task.mm)
    pid: int = task.tgid

    def ask(pieces: Extents) -> None:
        agent.touch([Portion(pid, Touching.READ, pieces[["gva", "size"]].tolist())])

    name = f"pid {pages.pid}"
    return Target(
        name=name,
        space=space,
        frames=guest.kernel.private_frames,
        pieces=pages.pieces,
        source=pages.sink,
        ask=ask,
        check=Alive(name, guest.kernel, task, space),
    )
