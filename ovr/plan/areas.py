"""Plan memory: decide for every run of pages whether it goes outside, with the reason if not.

Pages that go outside are dropped from the inside pagemap. The guest allocates frames for them in
one of three ways: CRIU's restorer populates pieces of writable anonymous areas
(``MADV_POPULATE_WRITE`` in ``VmaEntry.madv``), cut so that only dumped pages are allocated; CRIU
populates pages that children inherit before it forks (`sharing`); the agent touches all others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ovr.images import Memory, Task
from ovr.images.cow import Contents, inheritance
from ovr.images.shared import SharedMemory
from ovr.images.vma import (
    MAP_GROWSDOWN,
    MAP_HUGETLB,
    PROT_WRITE,
    VMA_ANON_PRIVATE,
    VMA_AREA_AIORING,
    VMA_AREA_SHSTK,
    VMA_AREA_UPROBES,
    VMA_AREA_VDSO,
    VMA_AREA_VVAR,
    is_private,
)
from ovr.memory.extents import Extents, addresses_of, as_pieces, cut_to, total
from ovr.memory.ranges import Ranges, common, inside, join, ranges_of
from ovr.plan.pages import Allocation, Area, Reason, place, placed
from ovr.plan.sharing import CowPlan, Sharing, plan_cow

__all__ = [
    "Cuts",
    "MemoryPlan",
    "SharedPlan",
    "TaskPlan",
    "cuts_of",
    "pieces_of",
    "plan_shared",
    "plan_tasks",
]

_LARGE: Final = 64 << 20
"""Size in bytes from which the agent allocates a piece faster than CRIU does."""
_MAP_TYPE: Final = 0x0F
_MAP_DROPPABLE: Final = 0x08

Cuts = Mapping[tuple[int, int], Sequence[int]]
"""Addresses at which the areas of a task are cut, by the areas' bounds."""


@dataclass(frozen=True)
class MemoryPlan:
    """The plan for the pages of one pagemap.

    Attributes:
        runs: all runs of pages, a `pages.PLACED` array.
    """

    runs: Extents

    @property
    def memory(self) -> Memory:
        """The pages in the images."""
        raise NotImplementedError

    @property
    def bytes_total(self) -> int:
        """Size of all pages, in bytes."""
        return total(self.runs)

    @property
    def bytes_outside(self) -> int:
        """Size of the pages that go outside, in bytes."""
        return total(self.outside)

    @property
    def outside(self) -> Extents:
        """The runs that go outside."""
        outside: Extents = self.runs[self.runs["reason"] == Reason.OUTSIDE]
        return outside

    @cached_property
    def pieces(self) -> dict[int, Extents]:
        """The pages that go outside and are not shared by fork, as `pieces_of`."""
        outside = self.outside
        return pieces_of(outside[outside["allocation"] != Allocation.BEFORE_FORK])

    def by_reason(self) -> dict[Reason, int]:
        """Return the bytes of each verdict."""
        return {
            Reason(reason): total(self.runs[self.runs["reason"] == reason])
            for reason in np.unique(self.runs["reason"]).tolist()
        }

    def to_touch(self) -> Ranges:
        """Return the pages that the agent has to allocate."""
        outside = self.outside
        return addresses_of(outside[outside["allocation"] == Allocation.AGENT])

    def first_pages(self) -> list[int]:
        """Return the pages for which the inside pagemap keeps an empty entry."""
        return []


@dataclass(frozen=True)
class TaskPlan(MemoryPlan):
    """The plan for the private pages of a live task.

    Attributes:
        task: the task in the images.
        sharing: the pages that it shares with its parent or its children.
    """

    task: Task
    sharing: Sharing

    @property
    def memory(self) -> Memory:
        """The task's private pages."""
        assert self.task.memory is not None
        return self.task.memory

    @cached_property
    def pieces_of_criu(self) -> Ranges:
        """The ranges that CRIU's restorer populates for this task."""
        outside = self.outside
        return addresses_of(outside[outside["allocation"] == Allocation.CRIU])

    @cached_property
    def before_fork(self) -> dict[int, Extents]:
        """The pages that are allocated before the fork and inherited, as `pieces_of`."""
        outside = self.outside
        return pieces_of(outside[outside["allocation"] == Allocation.BEFORE_FORK])

    def inherited(self, root: int) -> dict[int, Extents]:
        """Return the pages inherited from the ancestor with the pid `root`, as `pieces_of`."""
        runs = self.runs[self.runs["reason"] == Reason.INHERITED]
        ranges = self.sharing.from_root[root]
        return {
            level: cut_to(pieces, ranges["start"], ranges["end"])
            for level, pieces in pieces_of(runs).items()
        }

    @property
    def spared(self) -> Ranges:
        """The bytes that the guest kernel writes: the registered ``struct rseq``.

        CRIU registers them while it builds the skeleton. The kernel stores the CPU number there.
        Newer kernels store it again only when it changes, so an overwritten number would persist.
        """
        return self.task.rseq_areas

    def first_pages(self) -> list[int]:
        """Return the first page of each area if it goes outside."""
        assert self.task.vmas is not None
        vmas = self.task.vmas[is_private(self.task.vmas)]
        owner = np.searchsorted(vmas["start"], self.runs["gva"], side="right") - 1
        first = np.diff(owner, prepend=-1) != 0
        pages: list[int] = self.runs["gva"][
            first & (self.runs["reason"] <= Reason.INHERITED)
        ].tolist()
        return pages

    @cached_property
    def large_pieces(self) -> Ranges:
        """The ranges of `pieces_of_criu` that the agent allocates faster, with many threads."""
        pieces = self.pieces_of_criu
        large: Ranges = pieces[pieces["end"] - pieces["start"] >= _LARGE]
        return large


@dataclass(frozen=True)
class SharedPlan(MemoryPlan):
    """The plan for one object of shared memory, which is written once for all tasks.

    Attributes:
        shared: the object in the images.
    """

    shared: SharedMemory

    @property
    def memory(self) -> Memory:
        """The object's pages."""
        return self.shared.memory


def plan_tasks(
    alive: Sequence[Task], contents: Contents, *, asked: bool, force: bool
) -> tuple[tuple[TaskPlan, ...], CowPlan]:
    """Plan the private pages of tasks, and the pages that they share by fork.

    Args:
        alive: the live tasks, parents first.
        contents: compares their pages.
        asked: whether memory is to be written outside at all.
        force: whether the guest's agent can allocate pages of areas that are not writable.
    """
    areas = {task.pid: _areas(task, asked=asked, force=force) for task in alive}
    inherited = inheritance(alive, contents) if asked else {}
    cow = plan_cow(alive, inherited, lambda task: _open(areas[task.pid]), contents)
    plans = []
    for task in alive:
        assert task.memory is not None
        sharing = cow.tasks[task.pid]
        runs = place(task.memory.entries, areas[task.pid], sharing.cow)
        plans.append(TaskPlan(runs, task, sharing))
    return tuple(plans), cow


def _open(areas: Sequence[Area]) -> Ranges:
    # The areas that go outside and may be cut.
    chosen = [area for area in areas if area.reason == Reason.OUTSIDE and area.may_be_cut]
    rows = np.array([(area.start, area.end) for area in chosen], dtype="<u8").reshape(-1, 2)
    return join(ranges_of(rows[:, 0], rows[:, 1]))


def plan_shared(objects: Sequence[SharedMemory], *, asked: bool) -> tuple[SharedPlan, ...]:
    """Plan the pages of shared memory, with one verdict for each object."""
    return tuple(SharedPlan(_placed(shared, asked), shared) for shared in objects)


def cuts_of(plans: Sequence[TaskPlan], cow: CowPlan) -> dict[int, Cuts]:
    """Return the cuts of each task's areas, by pid.

    Each piece that CRIU populates is an area of its own. A piece is cut in all tasks of a family,
    because CRIU recognises an inherited area by its bounds.
    """
    families: dict[int, list[Ranges]] = {root: [*edges] for root, edges in cow.edges.items()}
    for plan in plans:
        for root, areas in cow.rooted[plan.task.pid].items():
            families[root].append(common(plan.pieces_of_criu, areas))
    for plan in plans:
        if plan.task.pid in families:
            families[plan.task.pid].append(
                common(plan.pieces_of_criu, cow.inherited_from(plan.task.pid))
            )
    points = {root: _points(*sets) for root, sets in families.items()}
    found = {}
    for plan in plans:
        pid = plan.task.pid
        own = [_points(plan.pieces_of_criu)]
        own += [_within(points[root], areas) for root, areas in cow.rooted[pid].items()]
        if pid in points:
            own.append(_within(points[pid], cow.inherited_from(pid)))
        found[pid] = _cuts(plan.task, np.unique(np.concatenate(own)))
    return found


def _points(*sets: Ranges) -> NDArray[np.uint64]:
    return np.unique(np.concatenate([s[side] for s in sets for side in ("start", "end")]))


def _within(points: NDArray[np.uint64], areas: Ranges) -> NDArray[np.uint64]:
    return points[inside(points, areas["start"], areas["end"])]


def _cuts(task: Task, points: NDArray[np.uint64]) -> Cuts:
    assert task.vmas is not None
    vmas = task.vmas[is_private(task.vmas)]
    first = np.searchsorted(points, vmas["start"], side="right")
    last = np.searchsorted(points, vmas["end"], side="left")
    return {
        (int(vmas["start"][n]), int(vmas["end"][n])): points[first[n] : last[n]].tolist()
        for n in np.flatnonzero(first < last).tolist()
    }


def _areas(task: Task, *, asked: bool, force: bool) -> list[Area]:
    assert task.vmas is not None
    return [
        _area(*row, asked=asked, force=force)
        for row in task.vmas[is_private(task.vmas)][
            ["start", "end", "status", "flags", "prot"]
        ].tolist()
    ]


def _area(
    start: int, end: int, status: int, flags: int, prot: int, *, asked: bool, force: bool
) -> Area:
    if status & (VMA_AREA_VDSO | VMA_AREA_VVAR):
        return Area(start, end, Reason.VDSO)
    special = status & (VMA_AREA_AIORING | VMA_AREA_SHSTK | VMA_AREA_UPROBES)
    if special or flags & _MAP_TYPE == _MAP_DROPPABLE:
        return Area(start, end, Reason.SPECIAL)
    if not asked:
        return Area(start, end, Reason.NOT_ASKED)
    writable = bool(prot & PROT_WRITE)
    if flags & MAP_HUGETLB:
        # The kernel does not merge hugetlb pieces, nor let the agent force a write (mm/gup.c).
        return Area(start, end, Reason.OUTSIDE, populates=True, touchable=writable)
    if not (writable or force):
        return Area(start, end, Reason.READ_ONLY)
    may_be_cut = not flags & MAP_GROWSDOWN
    populates = may_be_cut and writable and bool(status & VMA_ANON_PRIVATE)
    return Area(start, end, Reason.OUTSIDE, populates, divisible=populates, may_be_cut=may_be_cut)


def _placed(shared: SharedMemory, asked: bool) -> Extents:
    runs = placed(shared.memory.entries)
    runs["reason"] = _shared_verdict(shared, asked)
    return runs


def _shared_verdict(shared: SharedMemory, asked: bool) -> Reason:
    if not asked:
        return Reason.NOT_ASKED
    if shared.sealed:
        return Reason.SEALED
    return Reason.OUTSIDE if shared.places else Reason.UNREACHABLE


def pieces_of(runs: Extents) -> dict[int, Extents]:
    """Return `pages.PLACED` runs as `_fastcopy.PIECE` arrays by level of the images."""
    found = {}
    for level in np.unique(runs["level"]).tolist():
        here = runs[runs["level"] == level]
        found[level] = as_pieces(here)
    return found
