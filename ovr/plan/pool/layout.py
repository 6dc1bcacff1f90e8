"""Choose the areas of tasks that get memory from the guest's pool, and lay them out in it.

Whole units of 2 MiB of private, anonymous, writable memory come from a pool. An area's part of the
pool has the same offset modulo 2 MiB as the area and no gaps, so that huge pages stay whole when
they are moved. The largest area, if possible, has the same offset modulo 1 GiB, so that whole page
tables can be moved too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ovr.images import VmaEntry
from ovr.images.vma import (
    MADV_HUGEPAGE,
    MADV_POPULATE_WRITE,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_HUGETLB,
    MAP_PRIVATE,
    MAP_STACK,
    PROT_READ,
    PROT_WRITE,
    VMA_ANON_PRIVATE,
    is_private,
)
from ovr.memory.ranges import RANGE, Ranges, common, join, ranges_of
from ovr.plan.areas import TaskPlan
from ovr.plan.pool.seats import Seat, Seats, family_order
from ovr.plan.pool.units import TABLE_SPAN, UNIT
from ovr.plan.sharing import CowPlan

__all__ = [
    "NOTHING",
    "POOL_ADDRESS",
    "Pool",
    "PoolArea",
    "alone",
    "assign_ranges",
    "family",
    "fitting_pool",
    "one_range",
    "pool_areas",
    "pool_size_of",
    "total_of",
]

POOL_ADDRESS: Final = 0x4000_0000_0000
"""Preferred GVA of the guest's pool (POOL_SEAT in guest/warm/pool.h)."""
NOTHING: Final = "no area has enough units of 2 MiB to use a pool"

_FLAGS: Final = MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_STACK
_ADVICE: Final = 1 << MADV_HUGEPAGE | 1 << MADV_POPULATE_WRITE
_WRITABLE: Final = PROT_READ | PROT_WRITE


@dataclass(frozen=True)
class Pool:
    """The guest's pool.

    Attributes:
        size: its size in bytes.
        criu: the version of the CRIU that has it.
        at: its GVA in that CRIU's process.
        seats: if it has pages of the tree already: the parts of it that only those areas can use.
    """

    size: int
    criu: str
    at: int
    seats: Seats | None = None


@dataclass
class PoolArea:
    """An area of a task, and its part of the pool.

    Attributes:
        start: its first GVA in the task.
        end: the GVA after it.
        kept: its units that have pages, as GVAs in the task.
        at: offset of its start in the pool, in bytes.
    """

    start: int
    end: int
    kept: Ranges
    at: int = 0

    @property
    def low(self) -> int:
        """The GVA of the first unit in the task."""
        return self.start // UNIT * UNIT

    @property
    def room(self) -> int:
        """Size of its part of the pool, in bytes."""
        return -(-self.end // UNIT) * UNIT - self.low

    @property
    def part(self) -> tuple[int, int]:
        """Its part of the pool: offsets, half-open."""
        first = self.at - (self.start - self.low)
        return first, first + self.room


def fitting_pool(
    plans: Sequence[TaskPlan], cow: CowPlan, areas: Mapping[int, Sequence[VmaEntry]]
) -> tuple[int, int] | None:
    """Return size and best offset modulo `TABLE_SPAN` of the smallest pool for all areas, in bytes.

    None if no area can use a pool.

    Args:
        plans: the live tasks, parents first.
        cow: the pages that they share.
        areas: the areas of each task in the inside image set, by pid.
    """
    served = pool_areas(plans, cow, areas)
    size = pool_size_of(served)
    if not size:
        return None
    assign_ranges(served, Pool(size, "", POOL_ADDRESS))
    aligned = _to_align(served)
    return size, (aligned.start - aligned.at) % TABLE_SPAN if aligned else 0


def pool_areas(
    plans: Sequence[TaskPlan],
    cow: CowPlan,
    areas: Mapping[int, Sequence[VmaEntry]],
    seats: Seats | None = None,
) -> dict[int, list[PoolArea]]:
    """Return the areas of each task that can use a pool, by pid, descendants after ancestors.

    Args:
        plans: the live tasks, parents first.
        cow: the pages that they share.
        areas: the areas of each task in the inside image set, by pid.
        seats: the parts of areas that can use it; None: all can.
    """
    by_pid = {plan.task.pid: plan for plan in plans}
    taken = _inherited(plans, areas)
    found = {}
    for pid in _family_order(plans):
        candidates = _candidates(by_pid[pid], cow, taken[pid])
        if seats is not None:
            relatives = _relatives(plans, by_pid[pid])
            candidates = _seated(candidates, seats.of.get(pid, ()), relatives)
        found[pid] = [area for area in candidates if 2 * total_of(area.kept) >= area.room]
    return found if seats is None else _in_order(found)


def pool_size_of(served: Mapping[int, Sequence[PoolArea]]) -> int:
    """Return the size of a pool for all these areas, in bytes."""
    return sum(area.room for each in served.values() for area in each)


def alone(served: Mapping[int, Sequence[PoolArea]]) -> bool:
    """Return whether all areas belong to one task."""
    return sum(map(bool, served.values())) == 1


def _to_align(served: Mapping[int, Sequence[PoolArea]]) -> PoolArea | None:
    # The area that gets its final offset modulo `TABLE_SPAN`: the largest, if all belong to one
    # task, because then CRIU's reservation can be at the same address.
    largest = max((area for each in served.values() for area in each), key=lambda area: area.room)
    return largest if alone(served) and largest.room >= TABLE_SPAN else None


def assign_ranges(
    served: Mapping[int, Sequence[PoolArea]], pool: Pool
) -> dict[int, tuple[int, int]]:
    """Place the areas in the pool, one after the other; return the part of each task, by pid.

    Areas with seats are there already.
    """
    if pool.seats is not None:
        return _parts_of_seats(served)
    aligned = _to_align(served)
    left = pool.size - pool_size_of(served)
    at = 0
    parts = {}
    for pid, each in served.items():
        first = at
        for area in each:
            gap = (area.low - pool.at - at) % TABLE_SPAN
            if area is aligned and gap <= left and gap % UNIT == 0:
                at += gap
            area.at = at + area.start - area.low
            at += area.room
        parts[pid] = first, at
    return parts


def _parts_of_seats(served: Mapping[int, Sequence[PoolArea]]) -> dict[int, tuple[int, int]]:
    at = 0
    parts = {}
    for pid, each in served.items():
        first = each[0].part[0] if each else at
        at = max([at, *(area.part[1] for area in each)])
        parts[pid] = first, at
    return parts


def _family_order(plans: Sequence[TaskPlan]) -> list[int]:
    # In this order the parts of a task and its descendants are one range of the pool.
    return family_order((plan.task.pid, plan.task.ppid) for plan in plans)


def _inherited(
    plans: Sequence[TaskPlan], areas: Mapping[int, Sequence[VmaEntry]]
) -> dict[int, Ranges]:
    # The areas that CRIU lets a task inherit or pass on to children: pieces that parent and child
    # have at the same address, even if they belong to different areas.
    bounds = {pid: {(area.start, area.end) for area in each} for pid, each in areas.items()}
    same: dict[int, set[tuple[int, int]]] = {pid: set() for pid in bounds}
    for plan in plans:
        pid, parent = plan.task.pid, plan.task.ppid
        if parent in bounds:
            both = bounds[pid] & bounds[parent]
            same[pid] |= both
            same[parent] |= both
    return {pid: join(np.array([*each], dtype=RANGE)) for pid, each in same.items()}


def _candidates(plan: TaskPlan, cow: CowPlan, inherited: Ranges) -> Iterator[PoolArea]:
    # The areas of a task that may get memory from a pool.
    vmas, mm, pid = plan.task.vmas, plan.task.mm, plan.task.pid
    assert vmas is not None and mm is not None
    if mm.thp_disabled:
        return  # the pool has huge pages
    if (vmas[is_private(vmas)]["flags"] & MAP_HUGETLB).any():
        return  # depends on CRIU's version whether its reservation contains them
    plain = is_private(vmas) & (vmas["status"] & VMA_ANON_PRIVATE != 0)
    plain &= (vmas["flags"] & ~np.uint32(_FLAGS) == 0) & (vmas["madv"] & ~np.uint64(_ADVICE) == 0)
    plain &= vmas["prot"] & _WRITABLE == _WRITABLE
    plain &= vmas["end"] - vmas["start"] >= UNIT
    # Children inherit these areas, and memory from the pool must not be visible to them.
    others = join(inherited, family(cow, pid))
    for start, end in vmas[plain][["start", "end"]].tolist():
        area = one_range(start, end)
        if len(common(area, others)):
            continue
        yield PoolArea(start, end, _units(common(plan.pieces_of_criu, area)))


def _seated(
    candidates: Iterable[PoolArea], seats: Sequence[Seat], relatives: Ranges
) -> Iterator[PoolArea]:
    # The parts of areas that have a seat. An area that is cut must not become one that CRIU takes
    # for that of a parent or child.
    for area in candidates:
        for seat in seats:
            start, end = max(area.start, seat.low), min(area.end, seat.high)
            if end - start < UNIT:
                continue
            whole = (start, end) == (area.start, area.end)
            if whole or not len(common(relatives, one_range(area.start, area.end))):
                at = seat.at + start - seat.low
                yield PoolArea(start, end, common(area.kept, one_range(start, end)), at)


def _in_order(found: Mapping[int, Sequence[PoolArea]]) -> dict[int, list[PoolArea]]:
    # The tree may be another one since it got its seats, and its order too.
    end = 0
    kept = {}
    for pid, each in found.items():
        kept[pid] = [area for area in each if area.part[0] >= end]
        end = max([end, *(area.part[1] for area in kept[pid])])
    return kept


def _relatives(plans: Sequence[TaskPlan], plan: TaskPlan) -> Ranges:
    # The private areas of the parent and the children of a task.
    near = []
    for other in plans:
        if plan.task.ppid == other.task.pid or other.task.ppid == plan.task.pid:
            vmas = other.task.vmas
            assert vmas is not None
            private = vmas[is_private(vmas)]
            near.append(ranges_of(private["start"], private["end"]))
    return join(*near)


def family(cow: CowPlan, pid: int) -> Ranges:
    """Return the areas that a task inherits, or that others inherit from it."""
    return join(cow.inherited_from(pid), *cow.rooted[pid].values())


def one_range(start: int, end: int) -> Ranges:
    """Return a `Ranges` array with one range."""
    return ranges_of(np.array([start], "<u8"), np.array([end], "<u8"))


def _units(ranges: Ranges) -> Ranges:
    unit = np.uint64(UNIT)
    start = (ranges["start"] + unit - np.uint64(1)) // unit * unit
    end = ranges["end"] // unit * unit
    return ranges_of(start[start < end], end[start < end])


def total_of(ranges: Ranges) -> int:
    """Return the total size of ranges in bytes."""
    return int((ranges["end"] - ranges["start"]).sum())
