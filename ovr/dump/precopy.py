"""Copy pages while the tree runs, so that few are left when it is stopped.

The agent clears the soft-dirty bits first. What was copied since is still right when the tree is
stopped, if the bit is clear and the same frame is at the same address as when it was copied: bits
move along with pages that the kernel moves, to another frame or, by mremap(2), to another address,
where they are taken for pages that were not copied.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from ovr._fastcopy import RUN
from ovr.attempt.attempt import Attempt
from ovr.attempt.saver import Saver
from ovr.attempt.targets import Target
from ovr.dump.memory import Dumped
from ovr.dump.output import INVENTORY, NewImages, writable
from ovr.dump.running import RunningTask, running_tasks
from ovr.dump.targets import reader
from ovr.dump.verify import written
from ovr.errors import TaskDied
from ovr.guest.client.agent import Agent
from ovr.images.framing import encode, image_bytes
from ovr.images.messages import InventoryEntry
from ovr.images.pagemap import PAGEMAP_DTYPE, PE_PRESENT, Pagemap, encode_pagemap
from ovr.kernel import (
    mm_space,
    types_that_fit,
)
from ovr.memory.extents import (
    Extents,
    as_pieces,
    cut_out,
    cut_to,
    ends_of,
    joined,
    on_same_frames,
    total,
)
from ovr.memory.paging import AddressSpace, pieces
from ovr.memory.ranges import Ranges
from ovr.state import GuestTree
from ovr.vm.hold import Holder

__all__ = ["Copies", "pre_copy"]

_PRE_DUMP: Final = 0
"""Image version of a pre-dump, which no tree can be restored from (criu/cr-dump.c)."""


@dataclass
class _Copy:
    # Pages of a task: all that its pages image may have, runs that were copied, and those that had
    # not changed when the tree was stopped.
    task: RunningTask
    image: Path
    placed: Extents
    runs: list[Extents] = field(default_factory=list)
    unchanged: Extents = field(default_factory=lambda: np.empty(0, RUN))


class Copies:
    """Pages that were copied while the tree ran, by pid in the pid namespace of the tree."""

    def __init__(self) -> None:
        self._of: dict[int, _Copy] = {}

    def __bool__(self) -> bool:
        return bool(self._of)

    def of(
        self, task: RunningTask, image: Path, placed: Extents
    ) -> Callable[[Target, Extents], None]:
        """Return a function that adds runs of a task, as copied in one hold.

        Args:
            task: the task.
            image: its pages image.
            placed: the pages that may be copied, with their offsets there.
        """
        copy = self._of[task.pid] = _Copy(task, image, placed)
        return lambda _, copied: copy.runs.append(copied)

    def check_unchanged(
        self, dumped: Dumped, late: Ranges, guest: GuestTree, holder: Holder
    ) -> Extents:
        """Return the pages of a task that are still as they were copied.

        Args:
            dumped: what CRIU has found in the task.
            late: pages that may have been written to since CRIU has looked.
            guest: the held tree.
            holder: holds the VM.

        Raises:
            AttemptFailed: the task is not there.
            GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
        """
        copy = self._of.get(dumped.number)
        if dumped.shared or copy is None or not copy.runs:
            return np.empty(0, RUN)
        space = _space_of(guest, dumped.number)
        if space.root != copy.task.space.root:  # execve(2)
            return np.empty(0, RUN)
        copied = np.concatenate(copy.runs)
        copied.sort(order="gva")
        clean = np.zeros(len(dumped.clean), pieces(()).dtype)
        clean["gva"], clean["size"] = dumped.clean["gva"], dumped.clean["size"]
        unchanged = on_same_frames(copy.task.walk(holder, clean), copied)
        copy.unchanged = cut_out(unchanged, late)
        return copy.unchanged

    def targets(self, agent: Agent, stack: ExitStack) -> Iterator[Target]:
        """Yield the pages that had not changed, with their image as the source.

        Args:
            agent: asked for pages that are not in memory any more.
            stack: closes the images.
        """
        for pid, copy in self._of.items():
            if not len(copy.unchanged):
                continue
            starts, ends = copy.unchanged["gva"], ends_of(copy.unchanged)
            yield Target(
                name=f"pid {pid}", space=copy.task.space, frames=None,
                pieces=as_pieces(cut_to(copy.placed, starts, ends)),
                source=written(copy.image, stack), ask=reader(agent, copy.task.tgid),
                check=copy.task.check,
            )  # fmt: skip


def pre_copy(attempt: Attempt, root_pid: int, images: NewImages, copies: Copies) -> None:
    """Copy the pages of a running tree.

    Args:
        attempt: the attempt, before it has begun.
        root_pid: the root task, in the guest's initial pid namespace.
        images: gets them, as a pre-dump of CRIU would write them.
        copies: gets the pages.

    Raises:
        AttemptFailed: the agent is busy.
        UsageError: the images cannot be written.
        GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
        AgentUnreachable: the link broke.
    """
    saver = attempt.saver(lambda count: None)
    attempt.agent.track(root_pid)
    for number, task in enumerate(running_tasks(attempt.vm.kernel, root_pid), 1):
        with suppress(TaskDied):  # nobody will ask for its pages
            _copy_task(task, number, saver, images, copies)
    inventory = InventoryEntry(img_version=_PRE_DUMP)
    images.write(INVENTORY, image_bytes(INVENTORY, [encode(inventory)]))


def _copy_task(
    task: RunningTask, number: int, saver: Saver, images: NewImages, copies: Copies
) -> None:
    pages = task.pages(saver.holder)
    if not len(pages):
        return
    pages["offset"] = np.cumsum(pages["size"]) - pages["size"]
    _write_pagemap(images, task.pid, number, pages)
    with images.sink(f"pages-{number}.img", total(pages)) as sink, writable(images.path):
        target = Target(
            name=f"pid {task.pid}", space=task.space, frames=task.frames, pieces=as_pieces(pages),
            source=sink, ask=lambda _: None, check=task.check,
        )  # fmt: skip
        saver.save_own(target, copies.of(task, images.path / sink.name, pages))


@types_that_fit()
def _space_of(guest: GuestTree, pid: int) -> AddressSpace:
    return mm_space(guest.kernel, guest.task(pid).mm)


def _write_pagemap(images: NewImages, pid: int, number: int, runs: Extents) -> None:
    # Pages that were not there any more are listed as well: no pagemap refers to them.
    entries = np.zeros(len(runs), PAGEMAP_DTYPE)
    entries["gva"], entries["size"], entries["flags"] = runs["gva"], runs["size"], PE_PRESENT
    name = f"pagemap-{pid}.img"
    final = Pagemap(number, joined(entries), compat=True)
    images.write(name, encode_pagemap(final, name))
