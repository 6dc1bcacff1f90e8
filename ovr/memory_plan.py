"""The memory part of the plan: for every run of pages whether it goes outside, or why not.

Pages that go outside are dropped from the inside pagemap. The frames for them are allocated by the
guest: by CRIU's restorer, which is asked for it through ``VmaEntry.madv`` (``MADV_POPULATE_WRITE``)
for pieces of writable anonymous areas, cut so that only pages that existed are allocated; by the
agent, page by page, for everything else.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from ovr._fastcopy import PIECE
from ovr.addresses import PAGE_SHIFT
from ovr.images import PAGEMAP_DTYPE, Draft, InsideImages, Memory, MmEntry, Task, VmaEntry
from ovr.images.cow import shared_with_parents
from ovr.images.shared import SharedMemory
from ovr.images.vma import (
    MADV_POPULATE_WRITE,
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
    split_vma,
)
from ovr.placement import PLACED, RANGE, Allocation, Area, Reason, Runs, join_ranges, place
from ovr.ranges import total

__all__ = [
    "Cuts",
    "MemoryPlan",
    "SharedPlan",
    "TaskPlan",
    "cuts_of",
    "plan_shared",
    "plan_tasks",
]

_MAP_TYPE: Final = 0x0F
_MAP_DROPPABLE: Final = 0x08

Cuts = Mapping[tuple[int, int], Sequence[int]]
"""Where areas are cut, by their bounds: the same in all tasks, or CRIU would not see that a child
has an area of its parent."""


@dataclass(frozen=True)
class MemoryPlan:
    """The plan for the pages of one pagemap.

    Attributes:
        runs: all of them, a `placement.PLACED` array.
    """

    runs: Runs

    @property
    def memory(self) -> Memory:
        """Where their content lies."""
        raise NotImplementedError

    @property
    def bytes_total(self) -> int:
        """All pages, in bytes."""
        return total(self.runs)

    @property
    def bytes_outside(self) -> int:
        """Those of them that go outside."""
        return total(self.outside)

    @property
    def outside(self) -> Runs:
        """The runs that go outside."""
        outside: Runs = self.runs[self.runs["reason"] == Reason.OUTSIDE]
        return outside

    @cached_property
    def pieces(self) -> dict[int, Runs]:
        """The pages that go outside, as `_fastcopy.PIECE` arrays by level of the images."""
        outside = self.outside
        found = {}
        for level in np.unique(outside["level"]).tolist():
            runs = outside[outside["level"] == level]
            found[level] = pieces = np.empty(len(runs), dtype=PIECE)
            pieces["gva"], pieces["size"], pieces["offset"] = (
                runs["start"], runs["size"], runs["offset"],
            )  # fmt: skip
        return found

    def by_reason(self) -> dict[Reason, int]:
        """Bytes by verdict."""
        return {
            Reason(reason): total(self.runs[self.runs["reason"] == reason])
            for reason in np.unique(self.runs["reason"]).tolist()
        }

    def to_touch(self) -> Runs:
        """Return the `RANGE` array of pages that the agent is to allocate."""
        outside = self.outside
        return _joined(outside[outside["allocation"] == Allocation.AGENT])

    def drop(self, inside: InsideImages) -> None:
        """Leave the pages that go outside out of the inside pagemap."""
        if len(self.outside):
            inside.keep_pages(self.memory, _as_entries(self.runs), self.first_pages())

    def first_pages(self) -> list[int]:
        """Return the pages that go outside of which CRIU is to know that they were there."""
        return []


@dataclass(frozen=True)
class TaskPlan(MemoryPlan):
    """The plan for the private pages of one task that is alive.

    Attributes:
        task: what the images say.
    """

    task: Task

    @property
    def memory(self) -> Memory:
        """The task's private pages."""
        assert self.task.memory is not None
        return self.task.memory

    @property
    def pieces_of_criu(self) -> Runs:
        """The `RANGE` array of what CRIU is to populate."""
        outside = self.outside
        return _joined(outside[outside["allocation"] == Allocation.CRIU])

    @cached_property
    def spared(self) -> Runs:
        """The `RANGE` array of bytes that are the guest kernel's: the registered ``struct rseq``.

        CRIU registers them while it builds the skeleton. The kernel keeps the number of the CPU
        there; newer ones remember what they have written and write it again only when it changes,
        so that an old number over it would stay.
        """
        areas = [
            (rseq.rseq_abi_pointer, rseq.rseq_abi_pointer + rseq.rseq_abi_size)
            for core in self.task.cores.values()
            if core.thread_core.HasField("rseq_entry")
            for rseq in [core.thread_core.rseq_entry]
            if rseq.rseq_abi_size <= 1 << PAGE_SHIFT
        ]
        return join_ranges(np.array(sorted(areas), dtype=RANGE))

    def first_pages(self) -> list[int]:
        """Return the first page of each area where it goes outside."""
        assert self.task.vmas is not None
        vmas = self.task.vmas[is_private(self.task.vmas)]
        owner = np.searchsorted(vmas["start"], self.runs["start"], side="right") - 1
        first = np.diff(owner, prepend=-1) != 0
        pages: list[int] = self.runs["start"][
            first & (self.runs["reason"] == Reason.OUTSIDE)
        ].tolist()
        return pages

    def put(self, inside: InsideImages, draft: Draft, cuts: Cuts) -> None:
        """Make the task's part of the inside image set."""
        self.drop(inside)
        mm = draft.message(f"mm-{self.task.pid}.img", 0, MmEntry)
        _cut_and_populate(mm, self.pieces_of_criu, cuts)


@dataclass(frozen=True)
class SharedPlan(MemoryPlan):
    """The plan for one object of shared memory: it is written once, whoever has it.

    Attributes:
        shared: what the images say.
    """

    shared: SharedMemory

    @property
    def memory(self) -> Memory:
        """Its pages."""
        return self.shared.memory


def plan_tasks(alive: Sequence[Task], *, asked: bool, force: bool) -> tuple[TaskPlan, ...]:
    """Place the private pages of tasks.

    Args:
        alive: the tasks, parents first.
        asked: whether memory is to be written outside at all.
        force: whether the guest's agent can allocate pages of areas that are not writable.
    """
    shared = shared_with_parents(alive) if asked else {}
    plans = []
    for task in alive:
        assert task.memory is not None
        rows = np.concatenate(shared.get(task.pid, [np.empty((0, 2), "<u8")]))
        cow = np.empty(len(rows), dtype=RANGE)
        cow["start"], cow["end"] = rows[:, 0], rows[:, 1]
        areas = _areas(task, asked=asked, force=force)
        plans.append(TaskPlan(place(task.memory.entries, areas, join_ranges(cow)), task))
    return tuple(plans)


def plan_shared(objects: Sequence[SharedMemory], *, asked: bool) -> tuple[SharedPlan, ...]:
    """Place the pages of shared memory, each object as a whole."""
    return tuple(SharedPlan(_placed(shared, asked), shared) for shared in objects)


def cuts_of(plans: Iterable[TaskPlan]) -> Cuts:
    """Return where the areas of all tasks are cut, so that CRIU can populate pieces of them."""
    cuts: dict[tuple[int, int], set[int]] = defaultdict(set)
    for plan in plans:
        assert plan.task.vmas is not None
        vmas = plan.task.vmas[is_private(plan.task.vmas)]
        pieces = plan.pieces_of_criu
        owner = np.searchsorted(vmas["start"], pieces["start"], side="right") - 1
        for (low, high), (start, end) in zip(
            vmas[owner][["start", "end"]].tolist(), pieces.tolist(), strict=True
        ):
            cuts[low, high] |= {start, end} - {low, high}
    return {bounds: sorted(edges) for bounds, edges in cuts.items() if edges}


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
        # The agent cannot force a write there (check_vma_flags() of mm/gup.c).
        reason = Reason.OUTSIDE if writable and status & VMA_ANON_PRIVATE else Reason.HUGETLB
        return Area(start, end, reason, populates=True)
    if not (writable or force):
        return Area(start, end, Reason.READ_ONLY)
    populates = writable and bool(status & VMA_ANON_PRIVATE) and not flags & MAP_GROWSDOWN
    return Area(start, end, Reason.OUTSIDE, populates=populates, divisible=populates)


def _placed(shared: SharedMemory, asked: bool) -> Runs:
    entries = shared.memory.entries
    runs = np.zeros(len(entries), dtype=PLACED)
    runs["start"], runs["level"], runs["offset"] = (
        entries["vaddr"], entries["level"], entries["offset"],
    )  # fmt: skip
    runs["size"] = entries["nr_pages"] << np.uint64(PAGE_SHIFT)
    runs["reason"] = _shared_verdict(shared, asked)
    return runs


def _shared_verdict(shared: SharedMemory, asked: bool) -> Reason:
    if not asked:
        return Reason.NOT_ASKED
    if shared.hugetlb:
        return Reason.HUGETLB
    if shared.sealed:
        return Reason.SEALED
    return Reason.OUTSIDE if shared.places else Reason.UNREACHABLE


def _joined(runs: Runs) -> Runs:
    ranges = np.empty(len(runs), dtype=RANGE)
    ranges["start"], ranges["end"] = runs["start"], runs["start"] + runs["size"]
    return join_ranges(ranges)


def _as_entries(runs: Runs) -> Runs:
    kept = runs[runs["reason"] != Reason.OUTSIDE]
    entries = np.zeros(len(kept), dtype=PAGEMAP_DTYPE)
    entries["vaddr"] = kept["start"]
    entries["nr_pages"] = kept["size"] >> np.uint64(PAGE_SHIFT)
    return entries


def _cut_and_populate(mm: MmEntry, wanted: Runs, cuts: Cuts) -> None:
    areas: list[VmaEntry] = []
    for vma in mm.vmas:
        edges = cuts.get((vma.start, vma.end), ()) if _may_be_cut(vma) else ()
        for piece in split_vma(vma, edges) if edges else [vma]:
            # Every wanted range is cut out, but others may have been cut inside of it.
            at = int(np.searchsorted(wanted["start"], np.uint64(piece.start), side="right")) - 1
            if at >= 0 and piece.end <= int(wanted["end"][at]):
                piece.madv |= 1 << MADV_POPULATE_WRITE
            areas.append(piece)
    del mm.vmas[:]
    mm.vmas.extend(areas)


def _may_be_cut(vma: VmaEntry) -> bool:
    # Another task may have something else at the same place.
    return bool(vma.status & VMA_ANON_PRIVATE) and not vma.flags & (MAP_GROWSDOWN | MAP_HUGETLB)
