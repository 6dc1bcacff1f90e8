"""What a pool in the guest can give to the restored tasks, and the table that says so.

A CRIU that was started in advance holds a pool of allocated memory (`guest/warm/pool.c`). Of an
area that CRIU would be asked to populate, whole units of 2 MiB come from there; what is left of the
area is populated as ever. An area's part of the pool lies in it as the area lies in memory, modulo
2 MiB and without gaps, so that huge pages stay whole when they are moved and the kernel makes one
area of the pieces again.
"""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ovr.cow_plan import CowPlan
from ovr.images import ImageSet, VmaEntry
from ovr.images.runs import ends_of
from ovr.images.vma import (
    MADV_DOFORK,
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
    Vmas,
    is_private,
    vma_array,
)
from ovr.memory_plan import TaskPlan
from ovr.ranges import RANGE, Ranges, common, join, ranges_of, without

__all__ = ["SEAT", "TABLE", "UNIT", "Pool", "WarmPlan", "foreign_cgroup", "plan_warm"]

TABLE: Final = "ovr-warm.tab"
"""The table's name beside the images; WARM_TABLE in guest/agent.h."""
UNIT: Final = 2 << 20
"""What comes from the pool comes in whole huge pages, in bytes."""

# guest/warm/pool.h
_MAGIC: Final = 0x314D524157525655
_PLAIN, _WITHOUT_WRITE, _SERVE = range(3)

_FLAGS: Final = MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_STACK
_ADVICE: Final = 1 << MADV_HUGEPAGE | 1 << MADV_POPULATE_WRITE
_WRITABLE: Final = PROT_READ | PROT_WRITE
# Where CRIU's reservation may lie; half of what a process has.
_LOWEST: Final = 0x1000_0000_0000
_HIGHEST: Final = 0x7000_0000_0000
SEAT: Final = 0x4000_0000_0000
"""Where the guest's pool is, as far as nothing else was there; POOL_SEAT in guest/warm/pool.h."""

Points = NDArray[np.uint64]


@dataclass(frozen=True)
class Pool:
    """What the guest has ready.

    Attributes:
        size: of the pool, in bytes.
        criu: the version of the CRIU that has it.
    """

    size: int
    criu: str


@dataclass(frozen=True)
class WarmPlan:
    """The use of a pool.

    Attributes:
        table: for the library in the guest's CRIU.
        images: the pagemaps of the tasks that get something, and their pages images.
        size: how much of areas is made from the pool, in bytes, with what is absent in them.
        bytes: how much of the restored memory comes from it.
        why: if there is no use of it, why.
    """

    table: bytes = b""
    images: tuple[str, ...] = ()
    size: int = 0
    bytes: int = 0
    why: str = ""


@dataclass
class _Served:
    # An area, and its part of the pool: `at` is where its start is there, `kept` the units of it
    # that have pages, as addresses of the task.
    start: int
    end: int
    kept: Ranges
    at: int = 0

    @property
    def low(self) -> int:
        return self.start // UNIT * UNIT

    @property
    def room(self) -> int:
        # What it takes of the pool.
        return -(-self.end // UNIT) * UNIT - self.low


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
) -> WarmPlan:
    """Give out the pool.

    Args:
        plans: the tasks that are alive, parents first.
        cow: what they share.
        areas: the areas of each task as the inside image set has them, by pid. Those that are made
            from the pool are marked here.
        pool: what there is.
    """
    by_pid = {plan.task.pid: plan for plan in plans}
    taken = _inherited(plans, areas)
    served = {pid: [*_served(by_pid[pid], cow, taken[pid])] for pid in _family_order(plans)}
    size = 0
    parts = {}
    for pid, each in served.items():
        first = size
        for area in each:
            area.at = size + area.start - area.low
            size += area.room
        parts[pid] = first, size
    if not size:
        return WarmPlan(why="no area has enough whole 2 MiB that a pool could give")
    if size > pool.size:
        needed = f"the tasks need {size >> 20} MiB"
        return WarmPlan(why=f"the pool has {pool.size >> 20} MiB, and {needed}")
    users = [by_pid[pid].memory for pid, each in served.items() if each]
    names = (name for memory in users for name in (memory.name, memory.pages_name))
    all_served = [area for each in served.values() for area in each]
    table = _Table(cow, pool.criu, alone=sum(map(bool, served.values())) == 1)
    for pid, part in _subtrees(by_pid, parts).items():
        table.add(by_pid[pid], part, served[pid], areas[pid])
    return WarmPlan(
        table.build(),
        tuple(names),
        sum(area.end - area.start for area in all_served),
        sum(total_of(area.kept) for area in all_served),
    )


class _Table:
    # As guest/warm/pool.h has it, task by task.

    def __init__(self, cow: CowPlan, criu: str, *, alone: bool) -> None:
        self._cow = cow
        self._criu = criu
        self._alone = alone  # one task has it all
        self._tasks: list[bytes] = []
        self._drops: list[bytes] = []
        self._rows: list[bytes] = []
        self._lowest = _LOWEST
        self._end = 0

    def add(
        self, plan: TaskPlan, part: tuple[int, int], served: Sequence[_Served],
        areas: Sequence[VmaEntry],
    ) -> None:  # fmt: skip
        rows, extent, base = [], 0, 0
        if served:
            window = _window(areas, plan.task.pid)
            family = _family(self._cow, plan.task.pid)
            read_only = without(_mapped_without_write(plan, self._criu), family)
            rows = [*_rows(window, served, read_only)]
            extent, base = window.size, _seated(plan, window, served) if self._alone else 0
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


def total_of(ranges: Ranges) -> int:
    """Return how many bytes are in a set."""
    return int((ranges["end"] - ranges["start"]).sum())


def _family_order(plans: Sequence[TaskPlan]) -> list[int]:
    # So that what goes to a task and its descendants is one range of the pool.
    children: dict[int, list[int]] = {}
    for plan in plans:
        children.setdefault(plan.task.ppid, []).append(plan.task.pid)
    order: list[int] = []
    left = [plans[0].task.pid]
    while left:
        order.append(left.pop())
        left += children.get(order[-1], [])
    return order


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


def _inherited(
    plans: Sequence[TaskPlan], areas: Mapping[int, Sequence[VmaEntry]]
) -> dict[int, Ranges]:
    # What CRIU has a task inherit, or bequeath: pieces that parent and child have at the same
    # place, even if the areas that they are of are not the same.
    bounds = {pid: {(area.start, area.end) for area in each} for pid, each in areas.items()}
    same: dict[int, set[tuple[int, int]]] = {pid: set() for pid in bounds}
    for plan in plans:
        pid, parent = plan.task.pid, plan.task.ppid
        if parent in bounds:
            both = bounds[pid] & bounds[parent]
            same[pid] |= both
            same[parent] |= both
    return {pid: join(np.array([*each], dtype=RANGE)) for pid, each in same.items()}


def _served(plan: TaskPlan, cow: CowPlan, inherited: Ranges) -> Iterator[_Served]:
    # The areas of a task that are worth it.
    vmas, mm, pid = plan.task.vmas, plan.task.mm, plan.task.pid
    assert vmas is not None and mm is not None
    if mm.thp_disabled:
        return  # the pool has huge pages
    if (vmas[is_private(vmas)]["flags"] & MAP_HUGETLB).any():
        return  # these are not in CRIU's reservation, or are, by its version
    plain = is_private(vmas) & (vmas["status"] & VMA_ANON_PRIVATE != 0)
    plain &= (vmas["flags"] & ~np.uint32(_FLAGS) == 0) & (vmas["madv"] & ~np.uint64(_ADVICE) == 0)
    plain &= vmas["prot"] & _WRITABLE == _WRITABLE
    plain &= vmas["end"] - vmas["start"] >= UNIT
    # Children must inherit these, and find nothing there that is not theirs.
    family = join(inherited, _family(cow, pid))
    for start, end in vmas[plain][["start", "end"]].tolist():
        area = _range(start, end)
        if len(common(area, family)):
            continue
        served = _Served(start, end, _units(common(plan.pieces_of_criu, area)))
        if 2 * total_of(served.kept) >= served.room:
            yield served


def _family(cow: CowPlan, pid: int) -> Ranges:
    return join(cow.heirs(pid), *cow.rooted[pid].values())


def _range(start: int, end: int) -> Ranges:
    return ranges_of(np.array([start], "<u8"), np.array([end], "<u8"))


def _units(ranges: Ranges) -> Ranges:
    unit = np.uint64(UNIT)
    start = (ranges["start"] + unit - np.uint64(1)) // unit * unit
    end = ranges["end"] // unit * unit
    return ranges_of(start[start < end], end[start < end])


def _drops(served: _Served) -> Iterator[tuple[int, int]]:
    # The pages of its part of the pool that it does not need.
    whole = _range(served.low, served.low + served.room)
    shift = served.at - served.start
    for start, end in without(whole, served.kept).tolist():
        yield start + shift, end + shift


def _window(areas: Sequence[VmaEntry], pid: int) -> _Window:
    vmas = vma_array(areas, f"mm-{pid}.img")
    vmas = vmas[is_private(vmas)]
    sizes = vmas["end"] - vmas["start"]
    return _Window(vmas, np.concatenate([np.zeros(1, "<u8"), np.cumsum(sizes)]))


def _rows(window: _Window, served: Sequence[_Served], read_only: Ranges) -> Iterator[bytes]:
    starts = np.array([one.start for one in served], "<u8")
    for start, end, at, write in zip(
        window.areas["start"].tolist(), window.areas["end"].tolist(), window.at.tolist(),
        (window.areas["prot"] & PROT_WRITE != 0).tolist(), strict=False,
    ):  # fmt: skip
        one = int(np.searchsorted(starts, np.uint64(start), side="right")) - 1
        if one >= 0 and end <= served[one].end:
            how, where = _SERVE, served[one].at + start - served[one].start
        else:
            shut = not write and len(common(read_only, _range(start, end)))
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
    vaddr = entries["vaddr"][np.minimum(following, len(entries) - 1)]
    behind = vaddr >= vmas["end"] if _excludes_the_end(criu) else vaddr > vmas["end"]
    found = vmas[there & behind]
    return ranges_of(found["start"], found["end"])


def _excludes_the_end(criu: str) -> bool:
    version = re.match(r"\d+", criu)
    return version is not None and int(version[0]) >= 4


def _base(plan: TaskPlan, window: _Window, served: Sequence[_Served], base: int) -> int:
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


def _seated(plan: TaskPlan, window: _Window, served: Sequence[_Served]) -> int:
    # Where CRIU's reservation has the largest area where the pool has it, so that one move is
    # enough; 0 if an area of the task is in the way. What else is in the pool is moved once more.
    largest = max(served, key=lambda one: total_of(one.kept))
    base = SEAT + largest.at - window.place(largest.start)
    vmas = plan.task.vmas
    assert vmas is not None
    apart = (vmas["end"] <= base) | (vmas["start"] >= base + window.size)
    return base if apart.all() else 0


def _mark(areas: Sequence[VmaEntry], served: Sequence[_Served]) -> None:
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
    own = images.inventory.root_cg_set
    for task in images.tasks:
        for core in task.cores.values():
            for part in (core.tc, core.thread_core):
                if part.HasField("cg_set") and part.cg_set != own:
                    return True
    return any(option.startswith("--cgroup-root") for option in criu_options)
