"""Pages that were copied while the tree ran, and that are still as they were copied.

Soft-dirty bits are cleared before pages are copied. A page is still as it was copied if its bit is
clear and the same frame is at the same address: bits move along with pages that the kernel moves,
to another frame or, by mremap(2), to another address, where they are taken for pages that were not
copied.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ovr._fastcopy import OWNED, RUN, SOFT_DIRTY
from ovr.dump.memory import Dumped
from ovr.dump.running import RunningTask
from ovr.kernel import mm_space, types_that_fit
from ovr.memory.extents import Extents, addresses_of, cut_out, left_of, on_same_frames
from ovr.memory.paging import AddressSpace, pieces
from ovr.memory.ranges import Ranges, no_ranges
from ovr.state import GuestTree
from ovr.vm.hold import Holder

__all__ = ["Copies"]


@dataclass
class _Copy:
    # `runs`: a `_fastcopy.RUN` array, sorted by GVA. `offset` and `flags` are the caller's.
    task: RunningTask
    runs: Extents


class Copies:
    """Pages that were copied while the tree ran, by pid in the pid namespace of the tree."""

    def __init__(self) -> None:
        self._of: dict[int, _Copy] = {}
        self._checked: dict[int, _Copy] = {}

    def __bool__(self) -> bool:
        return bool(self._of)

    def add(self, task: RunningTask, copied: Extents) -> None:
        """Add pages that were copied, none of which is there already.

        Args:
            task: the task.
            copied: the runs as copied, a `_fastcopy.RUN` array; ``offset`` follows when a run is
                cut, ``flags`` stay.
        """
        copy = self._of.setdefault(task.pid, _Copy(task, np.empty(0, RUN)))
        runs = np.concatenate([copy.runs, copied])
        copy.runs = runs[np.argsort(runs["gva"], kind="stable")]

    def keep(self, seen: Iterable[tuple[RunningTask, Extents]]) -> None:
        """Keep the pages that have not changed, and forget all others.

        Args:
            seen: the tasks, frozen, with their pages, walked with `soft_dirty`.
        """
        kept = {}
        for task, found in seen:
            copy = self._of.get(task.pid)
            # The task may execute another program.
            if copy and copy.task.space.root == task.space.root:
                clean = found[found["flags"] & (OWNED | SOFT_DIRTY) == OWNED]
                runs = on_same_frames(copy.runs, clean)
                kept[task.pid] = _Copy(task, runs)
        self._of = kept

    def without(self, task: RunningTask, pages: Extents) -> Extents:
        """Return pages of a task without those that are there."""
        copy = self._of.get(task.pid)
        return left_of(pages, copy.runs) if copy else pages

    def addresses(self, task: RunningTask) -> Ranges:
        """Return the addresses of the pages of a task that are there."""
        copy = self._of.get(task.pid)
        return addresses_of(copy.runs) if copy else no_ranges()

    def check_unchanged(
        self, dumped: Dumped, late: Ranges, guest: GuestTree, holder: Holder
    ) -> Ranges:
        """Keep the pages of a stopped task that have not changed; return their addresses.

        Args:
            dumped: what CRIU has found in the task.
            late: pages that may have been written to since CRIU has looked.
            guest: the held tree.
            holder: holds the VM.

        Raises:
            AttemptFailed: the task is not there.
            GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
        """
        copy = None if dumped.shared else self._of.get(dumped.number)
        if copy is None:
            return no_ranges()
        if _space_of(guest, dumped.number).root != copy.task.space.root:  # execve(2)
            copy.runs = copy.runs[:0]
        clean = np.zeros(len(dumped.clean), pieces(()).dtype)
        clean["gva"], clean["size"] = dumped.clean["gva"], dumped.clean["size"]
        copy.runs = cut_out(on_same_frames(copy.runs, copy.task.walk(holder, clean)), late)
        self._checked[dumped.number] = copy
        return addresses_of(copy.runs)

    def unchanged(self) -> Iterator[tuple[RunningTask, Extents]]:
        """Yield the tasks with the runs that `check_unchanged` has kept."""
        for copy in self._checked.values():
            yield copy.task, copy.runs


@types_that_fit()
def _space_of(guest: GuestTree, pid: int) -> AddressSpace:
    return mm_space(guest.kernel, guest.task(pid).mm)
