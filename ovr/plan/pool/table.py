"""Make the table by which a CRIU with a pool takes memory from it.

A CRIU that was started in advance has a pool of allocated memory (`guest/warm/pool.c`). Whole units
of 2 MiB of the areas that CRIU would populate come from the pool; the rest is populated as usual.
"""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ovr.images import ImageSet, VmaEntry
from ovr.images.vma import MADV_DOFORK, PROT_WRITE, Vmas, is_private, vma_array
from ovr.memory.extents import ends_of
from ovr.memory.ranges import Ranges, common, join, ranges_of, without
from ovr.plan.areas import TaskPlan
from ovr.plan.pool.layout import (
    NOTHING,
    Pool,
    PoolArea,
    alone,
    assign_ranges,
    family,
    one_range,
    pool_areas,
    pool_size_of,
    total_of,
)
from ovr.plan.pool.units import UNIT
from ovr.plan.sharing import CowPlan

__all__ = ["NO_POOL", "TABLE", "Cold", "Warm", "foreign_cgroup", "plan_warm"]

TABLE: Final = "ovr-warm.tab"
"""File name of the table among the images; WARM_TABLE in guest/agent.h."""

# guest/warm/pool.h
_MAGIC: Final = 0x314D524157525655
_PLAIN, _WITHOUT_WRITE, _SERVE = range(3)

# Bounds for CRIU's reservation, about half of a process's address space.
_LOWEST: Final = 0x1000_0000_0000
_HIGHEST: Final = 0x7000_0000_0000

Points = NDArray[np.uint64]


@dataclass(frozen=True)
class Cold:
    """All memory is allocated at restore time; `why` is the reason why the pool is not used."""

    why: str


@dataclass(frozen=True)
class Warm:
    """Areas get memory from the pool.

    Attributes:
        table: the table for the library in the guest's CRIU.
        images: the pagemaps and pages images of the tasks that get memory from the pool.
        size: bytes of areas that use the pool, absent pages included.
        bytes: bytes of restored memory that come from it.
        kept: addresses of that memory, by pid.
    """

    table: bytes
    images: tuple[str, ...]
    size: int
    bytes: int
    kept: Mapping[int, Ranges]


NO_POOL: Final = Cold("the guest has no pool")


@dataclass(frozen=True)
class _Window:
    # CRIU's reservation for the private areas of a task, which lie in it one after the other: `at`
    # has the offset of each, and the total size.
    areas: Vmas
    at: Points

    @property
    def size(self) -> int:
        return int(self.at[-1])

    def place(self, start: int) -> int:
        # The offset of the area that begins at `start` in the task.
        return int(self.at[np.searchsorted(self.areas["start"], np.uint64(start))])


def plan_warm(
    plans: Sequence[TaskPlan],
    cow: CowPlan,
    areas: Mapping[int, Sequence[VmaEntry]],
    pool: Pool,
) -> Warm | Cold:
    """Assign the pool to areas, and mark these.

    Args:
        plans: the live tasks, parents first.
        cow: the pages that they share.
        areas: the areas of each task in the inside image set, by pid. Those that get memory from
            the pool are marked in place.
        pool: the guest's pool.
    """
    by_pid = {plan.task.pid: plan for plan in plans}
    served = pool_areas(plans, cow, areas, pool.seats)
    size = pool_size_of(served)
    if not size:
        return Cold(NOTHING)
    if size > pool.size and pool.seats is None:
        needed = f"the tasks need {size >> 20} MiB"
        return Cold(f"the pool has {pool.size >> 20} MiB, and {needed}")
    parts = assign_ranges(served, pool)
    users = [by_pid[pid].memory for pid, each in served.items() if each]
    names = (name for memory in users for name in (memory.name, memory.pages_name))
    all_served = [area for each in served.values() for area in each]
    table = _Table(cow, pool, alone=alone(served))
    for pid, part in _subtrees(by_pid, parts).items():
        table.add(by_pid[pid], part, served[pid], areas[pid])
    return Warm(
        table.build(),
        tuple(names),
        sum(area.end - area.start for area in all_served),
        sum(total_of(area.kept) for area in all_served),
        {pid: join(*(area.kept for area in each)) for pid, each in served.items()},
    )


class _Table:
    # In the format of guest/warm/pool.h, task by task.

    def __init__(self, cow: CowPlan, pool: Pool, *, alone: bool) -> None:
        self._cow = cow
        self._pool = pool
        self._alone = alone  # all areas belong to one task
        self._tasks: list[bytes] = []
        self._kept: list[Ranges] = []
        self._rows: list[bytes] = []
        self._lowest = _LOWEST
        self._end = 0

    def add(
        self, plan: TaskPlan, part: tuple[int, int], served: Sequence[PoolArea],
        areas: Sequence[VmaEntry],
    ) -> None:  # fmt: skip
        rows, extent, base = [], 0, 0
        if served:
            window = _window(areas, plan.task.pid)
            others = family(self._cow, plan.task.pid)
            read_only = without(_mapped_without_write(plan, self._pool.criu), others)
            rows = [*_rows(window, served, read_only)]
            extent = window.size
            base = _aligned_base(plan, window, served, self._pool.at) if self._alone else 0
            base = base or _base(plan, window, served, self._lowest)
            # A child's reservation is made while its parent still has its own.
            self._lowest = base + extent if base + extent < _HIGHEST else _LOWEST
            _mark(areas, served)
        first = len(self._rows)
        self._tasks.append(struct.pack("<7Q", plan.task.pid, *part, extent, base, first, len(rows)))
        self._kept += [_in_pool(area) for area in served]
        self._rows += rows
        self._end = max(self._end, part[1])

    def build(self) -> bytes:
        unused = without(one_range(0, self._end), join(*self._kept))
        drops = [struct.pack("<2Q", *drop) for drop in unused.tolist()]
        parts = self._tasks, drops, self._rows
        head = struct.pack("<5Q", _MAGIC, self._end, *map(len, parts))
        return b"".join([head, *self._tasks, *drops, *self._rows])


def _subtrees(
    plans: Mapping[int, TaskPlan], parts: dict[int, tuple[int, int]]
) -> dict[int, tuple[int, int]]:
    # The parts of the pool of each task and its descendants, if not empty.
    ends = {pid: end for pid, (_, end) in parts.items()}
    for pid in reversed(parts):
        parent = plans[pid].task.ppid
        if parent in ends:
            ends[parent] = max(ends[parent], ends[pid])
    found = {pid: (first, ends[pid]) for pid, (first, _) in parts.items()}
    return {pid: part for pid, part in found.items() if part[0] < part[1]}


def _in_pool(served: PoolArea) -> Ranges:
    # The units of the pool that have its pages.
    shift = np.uint64((served.at - served.start) % (1 << 64))
    return ranges_of(served.kept["start"] + shift, served.kept["end"] + shift)


def _window(areas: Sequence[VmaEntry], pid: int) -> _Window:
    vmas = vma_array(areas, f"mm-{pid}.img")
    vmas = vmas[is_private(vmas)]
    sizes = vmas["end"] - vmas["start"]
    return _Window(vmas, np.concatenate([np.zeros(1, "<u8"), np.cumsum(sizes)]))


def _rows(window: _Window, served: Sequence[PoolArea], read_only: Ranges) -> Iterator[bytes]:
    starts = np.array([one.start for one in served], "<u8")
    for start, end, at, write in zip(
        window.areas["start"].tolist(), window.areas["end"].tolist(), window.at.tolist(),
        (window.areas["prot"] & PROT_WRITE != 0).tolist(), strict=False,
    ):  # fmt: skip
        one = int(np.searchsorted(starts, np.uint64(start), side="right")) - 1
        if one >= 0 and end <= served[one].end:
            how, where = _SERVE, served[one].at + start - served[one].start
        else:
            shut = not write and len(common(read_only, one_range(start, end)))
            how, where = _WITHOUT_WRITE if shut else _PLAIN, 0
        yield struct.pack("<4Q", at, end - start, where, how)


def _mapped_without_write(plan: TaskPlan, criu: str) -> Ranges:
    # The areas that CRIU without a pool maps with their final protection, because its next page is
    # after them (premap_priv_vmas of criu/mem.c), unless they are inherited. The kernel accounts
    # for the others (VM_ACCOUNT).
    assert plan.task.vmas is not None
    vmas = plan.task.vmas[is_private(plan.task.vmas)]
    entries = plan.memory.entries
    following = np.searchsorted(ends_of(entries), vmas["start"], side="right")
    there = following < len(entries)
    gva = entries["gva"][np.minimum(following, len(entries) - 1)]
    behind = gva >= vmas["end"] if _excludes_the_end(criu) else gva > vmas["end"]
    found = vmas[there & behind]
    return ranges_of(found["start"], found["end"])


def _excludes_the_end(criu: str) -> bool:
    version = re.match(r"\d+", criu)
    return version is not None and int(version[0]) >= 4


def _base(plan: TaskPlan, window: _Window, served: Sequence[PoolArea], base: int) -> int:
    # The best address for CRIU's reservation: apart from all areas of the task, and such that most
    # memory from the pool has its final offset modulo huge pages.
    shifts: dict[int, int] = {}
    for one in served:
        shift = (one.start - window.place(one.start)) % UNIT
        shifts[shift] = shifts.get(shift, 0) + total_of(one.kept)
    shift = max(shifts, key=lambda each: shifts[each])
    vmas = plan.task.vmas
    assert vmas is not None
    base = -(-base // UNIT) * UNIT
    for start, end in vmas[["start", "end"]].tolist():
        if start < base + UNIT + window.size and base < end < _HIGHEST:
            base = -(-end // UNIT) * UNIT
    return base + shift


def _aligned_base(plan: TaskPlan, window: _Window, served: Sequence[PoolArea], pool: int) -> int:
    # The address for CRIU's reservation at which the largest area coincides with its part of the
    # pool, so that one move is enough; 0 if an area of the task is in the way. Other parts of the
    # pool are moved twice.
    largest = max(served, key=lambda one: one.room)
    base = pool + largest.at - window.place(largest.start)
    vmas = plan.task.vmas
    assert vmas is not None
    if not _LOWEST <= base <= _HIGHEST - window.size:
        return 0  # the pool is not near POOL_ADDRESS
    apart = (vmas["end"] <= base) | (vmas["start"] >= base + window.size)
    return base if apart.all() else 0


def _mark(areas: Sequence[VmaEntry], served: Sequence[PoolArea]) -> None:
    # The pool has MADV_DONTFORK, so that children and helpers that CRIU forks do not inherit it.
    starts = [one.start for one in served]
    for area in areas:
        one = int(np.searchsorted(starts, area.start, side="right")) - 1
        if one >= 0 and area.end <= served[one].end:
            area.madv |= 1 << MADV_DOFORK


def foreign_cgroup(images: ImageSet, criu_options: Sequence[str]) -> bool:
    """Return whether CRIU would move tasks into another cgroup than its own, which is charged."""
    if any(
        option in ("--manage-cgroups=ignore", "--manage-cgroups=none") for option in criu_options
    ):
        return False
    if any(option.startswith("--cgroup-root") for option in criu_options):
        return True
    parts = (
        part
        for task in images.tasks
        for core in task.cores.values()
        for part in (core.tc, core.thread_core)
    )
    own = images.inventory.root_cg_set
    return any(part.HasField("cg_set") and part.cg_set != own for part in parts)
