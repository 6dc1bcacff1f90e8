"""The tasks of a running tree, and the pages that they have."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import numpy as np

from ovr._fastcopy import OWNED, RUN, SOFT_DIRTY
from ovr.attempt.alive import Alive
from ovr.errors import GuestFault, TaskDied
from ovr.kernel import (
    VM_HUGETLB,
    VM_IO,
    VM_PFNMAP,
    VM_SOFTDIRTY,
    Kernel,
    Struct,
    Vma,
    mm_space,
    tree_of,
    types_that_fit,
    vmas,
)
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.extents import Extents, addresses_of, split, with_flags
from ovr.memory.paging import AddressSpace, Frames, pieces
from ovr.memory.ranges import Ranges, inside
from ovr.vm.hold import Holder, unbroken

__all__ = ["RunningTask", "running_tasks"]

_WALK_BYTES: Final = 4 << 30
"""Most bytes of address space that are walked in one hold."""
_RUNS_OF_ANY: Final = 1 << 20
"""Runs of pages that a task may have in any guest, as for a single walk (``native/walk.pxi``)."""
_NOT_MEMORY: Final = VM_IO | VM_PFNMAP | VM_HUGETLB


class RunningTask(NamedTuple):
    """A task that runs, with its private memory.

    Attributes:
        pid: its pid in the pid namespace of the tree.
        ppid: its parent's, likewise; the root's is of no use.
        tgid: its pid in the initial pid namespace.
        space: its address space.
        mappings: its private memory.
        areas: the same as a `_fastcopy.PIECE` array.
        marked: those of which the kernel takes every page for soft-dirty, whatever its page table
            entry says (``VM_SOFTDIRTY``): new ones, and what has become a part of them.
        frames: tells anonymous pages from those of files.
        check: raises `TaskDied` when it has another address space, or none.
    """

    pid: int
    ppid: int
    tgid: int
    space: AddressSpace
    mappings: Sequence[Vma]
    areas: Extents
    marked: Ranges
    frames: Frames
    check: Alive

    def pages(self, holder: Holder) -> Extents:
        """Return its anonymous pages, as they are now: a `_fastcopy.RUN` array.

        Raises:
            TaskDied: the task has died, or executes another program.
            GuestFault: page tables of the guest are damaged.
        """
        return with_flags(self.walk(holder, self.areas, self.frames), OWNED)

    def walk_marked(self, holder: Holder) -> Extents:
        """Return its pages, marked as ``OWNED`` and as ``SOFT_DIRTY``: a `_fastcopy.RUN` array.

        Raises:
            TaskDied, GuestFault: as `pages`.
        """
        found = self.walk(holder, self.areas, self.frames, soft_dirty=True)
        # No run reaches from one area into the next.
        marked = inside(found["gva"], self.marked["start"], self.marked["end"])
        found["flags"][marked] |= SOFT_DIRTY
        return found

    def walk(
        self,
        holder: Holder,
        areas: Extents,
        frames: Frames | None = None,
        *,
        soft_dirty: bool = False,
    ) -> Extents:
        """Return the pages in some areas, found in holds.

        Raises:
            TaskDied, GuestFault: as `pages`.
        """
        found = [np.empty(0, RUN)]
        left = max(_RUNS_OF_ANY, 2 * self.space.ram.size // PAGE_SIZE)
        for part in split(areas, _WALK_BYTES):

            def look(part: Extents = part) -> Extents:
                self.check()
                return self.space.walk(part, frames, soft_dirty=soft_dirty)

            found.append(unbroken(holder, look))
            left -= len(found[-1])
            if left < 0:
                raise GuestFault(
                    f"the page tables of pid {self.pid} lead to more pages than the guest can have",
                    int(part["gva"][0]),
                )
        return np.concatenate(found)


def running_tasks(kernel: Kernel, root_pid: int) -> Iterator[RunningTask]:
    """Yield the tasks of a tree that have memory; those that die meanwhile are left out.

    Args:
        kernel: the guest's kernel.
        root_pid: the root task, in the guest's initial pid namespace.

    Raises:
        GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
    """
    tasks = tree_of(kernel, root_pid)
    pids = {task.tgid: pid for pid, task in tasks}
    for pid, task in tasks:
        with suppress(TaskDied):
            if found := _describe(kernel, pid, task, pids):
                yield found


@types_that_fit()
def _describe(
    kernel: Kernel, pid: int, task: Struct, pids: Mapping[int, int]
) -> RunningTask | None:
    if not task.mm:  # a zombie
        return None
    ppid = pids.get(task.real_parent.tgid, 0)
    space = mm_space(kernel, task.mm)
    check = Alive(f"pid {pid}", kernel, task, space)
    try:
        private = [vma for vma in vmas(task.mm) if not vma.shared and not vma.flags & _NOT_MEMORY]
    except GuestFault:
        check()
        raise
    areas = pieces((vma.start, vma.end - vma.start, 0) for vma in private)
    new = pieces((vma.start, vma.end - vma.start, 0) for vma in private if vma.flags & VM_SOFTDIRTY)
    return RunningTask(
        pid, ppid, task.tgid, space, private, areas, addresses_of(new), kernel.anonymous_frames,
        check,
    )  # fmt: skip
