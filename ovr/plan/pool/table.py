"""What a pool in the guest can give to the restored tasks, and the table that says so.

A CRIU that was started in advance holds a pool of allocated memory (`guest/warm/pool.c`). Of an
area that CRIU would be asked to populate, whole units of 2 MiB come from there; what is left of the
area is populated as ever.
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
from ovr.memory.ranges import Ranges, common, ranges_of, without
from ovr.plan.areas import TaskPlan
from ovr.plan.pool.layout import (
    NOTHING,
    UNIT,
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
from ovr.plan.sharing import CowPlan

__all__ = ["NO_POOL", "TABLE", "Cold", "Warm", "foreign_cgroup", "plan_warm"]

TABLE: Final = "ovr-warm.tab"
"""The table's name beside the images; WARM_TABLE in guest/agent.h."""

# guest/warm/pool.h
_MAGIC: Final = 0x314D524157525655
_PLAIN, _WITHOUT_WRITE, _SERVE = range(3)

# Where CRIU's reservation may lie; half of what a process has.
_LOWEST: Final = 0x1000_0000_0000
_HIGHEST: Final = 0x7000_0000_0000

Points = NDArray[np.uint64]


@dataclass(frozen=True)
class Cold:
    """All memory is allocated at restore time; `why` the pool is not used."""

    why: str


@dataclass(frozen=True)
class Warm:
    """Areas are made from the pool.

    Attributes:
        table: for the library in the guest's CRIU.
        images: the page maps of the tasks that get memory from the pool, and their pages images.
        size: bytes of areas that are made from the pool, absent pages included.
        bytes: bytes of restored memory that come from it.
    """

    table: bytes
    images: tuple[str, ...]
    size: int
    bytes: int


NO_POOL: Final = Cold("the guest has no pool")


@dataclass(frozen=True)
class _Window:
    # CRIU's reservation for the private areas of a task: their places in it, one after the other.
    areas: Vmas
    at: Points

    @property
    def size(self) -> int:
        return int(self.at[-1])

    def place(self, start: int) -> int:
        # That of the area that begins at `start` in the task.
        return int(self.at[np.searchsorted(self.areas["start"], np.uint64(start))])


def plan_warm(
    plans: Sequence[TaskPlan],
    cow: CowPlan,
    areas: Mapping[int, Sequence[VmaEntry]],
    pool: Pool,
) -> Warm | Cold:
    """Give out the pool.

    Args:
        plans: the tasks that are alive, parents first.
        cow: what they share.
        areas: the areas of each task as the inside image set has them, by pid. Those that are made
            from the pool are marked here.
        pool: what there is.
    """
    by_pid = {plan.task.pid: plan for plan in plans}
    served = pool_areas(plans, cow, areas)
    size = pool_size_of(served)
    if not size:
        return Cold(NOTHING)
    if size > pool.size:
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
    )


class _Table:
    # As guest/warm/pool.h has it, task by task.

    def __init__(self, cow: CowPlan, pool: Pool, *, alone: bool) -> None:
        self._cow = cow
        self._pool = pool
        self._alone = alone  # one task has it all
        self._tasks: list[bytes] = []
        self._drops: list[bytes] = []
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
            # A child is made while its parent still has its own.
            self._lowest = base + extent if base + extent < _HIGHEST else _LOWEST
            _mark(areas, served)
        first = len(self._rows)
        self._tasks.append(struct.pack("<7Q", plan.task.pid, *part, extent, base, first, len(rows)))
        self._drops += [struct.pack("<2Q", *drop) for area in served for drop in _drops(area)]
        self._rows += rows
        self._end = max(self._end, part[1])

    def build(self) -> bytes:
        parts = self._tasks, self._drops, self._rows
        head = struct.pack("<5Q", _MAGIC, self._end, *map(len, parts))
        return b"".join([head, *self._tasks, *self._drops, *self._rows])


def _subtrees(
    plans: Mapping[int, TaskPlan], parts: dict[int, tuple[int, int]]
) -> dict[int, tuple[int, int]]:
    # Their parts of the pool with all their descendants', where there is any.
    ends = {pid: end for pid, (_, end) in parts.items()}
    for pid in reversed(parts):
        parent = plans[pid].task.ppid
        if parent in ends:
            ends[parent] = max(ends[parent], ends[pid])
    found = {pid: (first, ends[pid]) for pid, (first, _) in parts.items()}
    return {pid: part for pid, part in found.items() if part[0] < part[1]}


def _drops(served: PoolArea) -> Iterator[tuple[int, int]]:
    # The pages of its part of the pool that it does not need.
    whole = one_range(served.low, served.low + served.room)
    shift = served.at - served.start
    if served.gap:
        yield served.low + shift - served.gap, served.low + shift
    for start, end in without(whole, served.kept).tolist():
        yield start + shift, end + shift


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
    # The areas that CRIU alone would map as they are in the end, since the next page that it has is
    # behind them (premap_priv_vmas of criu/mem.c), unless they are inherited; the kernel accounts
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
    # Where CRIU's reservation is best: away from all areas of the task, and so that most of what
    # comes from the pool lies there as in the end, modulo huge pages.
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
    # Where CRIU's reservation has the largest area where the pool has it, so that one move is
    # enough; 0 if an area of the task is in the way. What else is in the pool is moved once more.
    largest = max(served, key=lambda one: one.room)
    base = pool + largest.at - window.place(largest.start)
    vmas = plan.task.vmas
    assert vmas is not None
    if not _LOWEST <= base <= _HIGHEST - window.size:
        return 0  # the pool is not where it should be
    apart = (vmas["end"] <= base) | (vmas["start"] >= base + window.size)
    return base if apart.all() else 0


def _mark(areas: Sequence[VmaEntry], served: Sequence[PoolArea]) -> None:
    # The pool is nobody's but its task's (MADV_DONTFORK) while CRIU makes children and helpers.
    starts = [one.start for one in served]
    for area in areas:
        one = int(np.searchsorted(starts, area.start, side="right")) - 1
        if one >= 0 and area.end <= served[one].end:
            area.madv |= 1 << MADV_DOFORK


def foreign_cgroup(images: ImageSet, criu_options: Sequence[str]) -> bool:
    """Tell whether CRIU would move tasks into another cgroup than its own, which is charged."""
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
