"""Build the inside image set, from which the guest's CRIU builds the skeleton.

Pages that go outside are left out of the pagemaps, areas are cut and marked so that CRIU allocates
frames for them, and values that go outside are replaced by neutral ones.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ovr.images import PAGEMAP_DTYPE, Draft, InsideImages, MmEntry, Slices, VmaEntry
from ovr.images.vma import (
    MADV_DONTNEED_LOCKED,
    MADV_POPULATE_WRITE,
    MAP_POPULATE,
    PROT_WRITE,
    split_vma,
)
from ovr.memory.extents import Extents
from ovr.memory.ranges import Ranges
from ovr.plan.areas import Cuts, MemoryPlan, TaskPlan, cuts_of
from ovr.plan.pages import Reason
from ovr.plan.plan import Plan
from ovr.plan.pool.layout import Pool, PoolArea, fitting_pool, pool_areas
from ovr.plan.pool.table import TABLE, Cold, Warm, plan_warm
from ovr.state.settings import neutralise

__all__ = ["Inside", "build_inside", "mark_piece", "pool_for"]


@dataclass(frozen=True)
class Inside:
    """The inside image set.

    Attributes:
        images: contents by file name, for `ovr.images.image_chunks`.
        memory: the plan for the pool, or the reason why it is not used.
    """

    images: Mapping[str, bytes | Slices]
    memory: Warm | Cold


def build_inside(plan: Plan, pool: Pool | Cold) -> Inside:
    """Build the inside image set of a plan.

    Args:
        plan: the plan.
        pool: the guest's pool, or the reason why none can be used.

    Raises:
        ImagesUnsupported: a task without any pages.
    """
    builder = _Builder(plan)
    if isinstance(pool, Cold):
        builder.add_tasks(large_by_criu=False)
        return Inside(builder.build(), pool)
    areas = builder.add_tasks(large_by_criu=True)
    if pool.seats is not None:
        areas = builder.cut(pool_areas(plan.tasks, plan.cow, areas, pool.seats))
    memory = plan_warm(plan.tasks, plan.cow, areas, pool)
    table = {TABLE: memory.table} if isinstance(memory, Warm) else {}
    return Inside(builder.build() | table, memory)


def pool_for(plan: Plan) -> tuple[int, int] | None:
    """Return size and alignment of the smallest pool for a plan, as `layout.fitting_pool`."""
    areas = _Builder(plan).add_tasks(large_by_criu=True)
    return fitting_pool(plan.tasks, plan.cow, areas)


class _Builder:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._inside = InsideImages(plan.images)
        self._draft = Draft(plan.images)

    def add_tasks(self, *, large_by_criu: bool) -> dict[int, Sequence[VmaEntry]]:
        """Drop the pages of tasks, cut and mark their areas; return the areas by pid.

        Args:
            large_by_criu: CRIU, not the agent, allocates `TaskPlan.large_pieces`.
        """
        cuts = cuts_of(self._plan.tasks, self._plan.cow)
        found: dict[int, Sequence[VmaEntry]] = {}
        for task in self._plan.tasks:
            self._drop(task)
            found[task.task.pid] = self._cut(task, cuts[task.task.pid], large_by_criu)
        return found

    def cut(self, served: Mapping[int, Sequence[PoolArea]]) -> dict[int, Sequence[VmaEntry]]:
        """Cut areas where only a part of them uses the pool; return the areas by pid."""
        found: dict[int, Sequence[VmaEntry]] = {}
        for pid, each in served.items():
            mm = self._draft.message(f"mm-{pid}.img", 0, MmEntry)
            edges = sorted({edge for area in each for edge in (area.start, area.end)})
            areas = [piece for vma in mm.vmas for piece in _cut_at(vma, edges)]
            del mm.vmas[:]
            mm.vmas.extend(areas)
            found[pid] = list(mm.vmas)
        return found

    def build(self) -> dict[str, bytes | Slices]:
        """Return the set, with shared memory dropped and values replaced by neutral ones."""
        for shared in self._plan.shared:
            self._drop(shared)
        neutralise(self._plan.settings, self._draft)
        self._draft.apply_to(self._inside)
        return self._inside.build()

    def _drop(self, memory: MemoryPlan) -> None:
        if (memory.runs["reason"] <= Reason.INHERITED).any():
            self._inside.keep_pages(memory.memory, _entries_kept(memory.runs), memory.first_pages())

    def _cut(self, task: TaskPlan, cuts: Cuts, large_by_criu: bool) -> Sequence[VmaEntry]:
        mm = self._draft.message(f"mm-{task.task.pid}.img", 0, MmEntry)
        areas: list[VmaEntry] = []
        for vma in mm.vmas:
            edges = cuts.get((vma.start, vma.end), ())
            for piece in split_vma(vma, edges) if edges else [vma]:
                mark_piece(piece, task, large_by_criu=large_by_criu)
                areas.append(piece)
        del mm.vmas[:]
        mm.vmas.extend(areas)
        return list(mm.vmas)


def mark_piece(piece: VmaEntry, task: TaskPlan, *, large_by_criu: bool) -> None:
    """Set the flags of a piece of an area by which CRIU allocates or drops its pages."""
    if _contains(task.pieces_of_criu, piece):
        if piece.prot & PROT_WRITE:
            if large_by_criu or not _contains(task.large_pieces, piece):
                piece.madv |= 1 << MADV_POPULATE_WRITE
        else:
            piece.flags |= MAP_POPULATE  # at that time CRIU has it mapped writable
    if _contains(task.sharing.dropped, piece):
        piece.madv |= 1 << MADV_DONTNEED_LOCKED
    if _contains(task.sharing.cow.before_fork, piece):
        piece.flags |= MAP_POPULATE


def _cut_at(vma: VmaEntry, edges: Sequence[int]) -> Iterable[VmaEntry]:
    first, last = bisect_right(edges, vma.start), bisect_left(edges, vma.end)
    return split_vma(vma, edges[first:last]) if first < last else (vma,)


def _contains(ranges: Ranges, vma: VmaEntry) -> bool:
    at = int(np.searchsorted(ranges["start"], np.uint64(vma.start), side="right")) - 1
    return at >= 0 and vma.end <= int(ranges["end"][at])


def _entries_kept(runs: Extents) -> Extents:
    kept = runs[runs["reason"] > Reason.INHERITED]
    entries = np.zeros(len(kept), dtype=PAGEMAP_DTYPE)
    entries["gva"], entries["size"] = kept["gva"], kept["size"]
    return entries
