"""The plan of a restore: what goes outside, what stays inside and why, and the inside image set.

The plan is made from the images alone. For every run of pages it gives a `Reason`; the pages that
go outside are dropped from the inside pagemap, and their areas ask CRIU's restorer for memory
(``MADV_POPULATE_WRITE`` in ``VmaEntry.madv``), cut so that only pages that existed are allocated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ovr._fastcopy import PIECE
from ovr.addresses import PAGE_SHIFT
from ovr.errors import UsageError
from ovr.images import (
    PAGEMAP_DTYPE,
    Draft,
    Extents,
    ImageSet,
    InsideImages,
    MmEntry,
    Task,
    VmaEntry,
)
from ovr.images.vma import (
    MADV_POPULATE_WRITE,
    MAP_GROWSDOWN,
    PROT_WRITE,
    VMA_ANON_PRIVATE,
    VMA_AREA_AIORING,
    VMA_AREA_SHSTK,
    VMA_AREA_UPROBES,
    VMA_AREA_VDSO,
    VMA_AREA_VVAR,
    VMA_FILE_PRIVATE,
    is_private,
    split_vma,
)
from ovr.placement import Area, Reason, place
from ovr.ram import Runs
from ovr.ranges import total
from ovr.state import KINDS, Setting
from ovr.state.settings import neutralise, take

__all__ = ["Plan", "TaskPlan", "make_plan"]

ALL: Final = "all"
MEMORY: Final = "memory"

_MAP_LOCKED: Final = 0x2000
_MAP_HUGETLB: Final = 0x40000
_MAP_TYPE: Final = 0x0F
_MAP_DROPPABLE: Final = 0x08
_RED_ZONE: Final = 128  # bytes below the stack pointer that the ABI leaves to the program


@dataclass(frozen=True)
class TaskPlan:
    """The plan for one task that is alive.

    Attributes:
        task: what the images say.
        runs: all of its private pages, a `placement.PLACED` array.
    """

    task: Task
    runs: NDArray[np.void]

    @property
    def bytes_total(self) -> int:
        """All private pages of the task, in bytes."""
        return total(self.runs)

    @property
    def bytes_outside(self) -> int:
        """Those of them that go outside."""
        return total(self._outside)

    @cached_property
    def pieces(self) -> dict[int, Runs]:
        """The pages that go outside, as `_fastcopy.PIECE` arrays by level of the images."""
        outside = self._outside
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

    @property
    def _outside(self) -> NDArray[np.void]:
        outside: NDArray[np.void] = self.runs[self.runs["reason"] == Reason.OUTSIDE]
        return outside

    def put(self, inside: InsideImages, draft: Draft) -> None:
        """Leave the pages that go outside out of the inside image set."""
        if len(self._outside):
            assert self.task.memory is not None
            inside.keep_pages(self.task.memory, _as_entries(self.runs))
            _populate(draft.message(f"mm-{self.task.pid}.img", 0, MmEntry), self._outside)


@dataclass(frozen=True)
class Plan:
    """The plan for an image set.

    Attributes:
        images: the image set.
        tasks: those that are alive, parents first.
        settings: the values of all kinds of state that go outside.
    """

    images: ImageSet
    tasks: tuple[TaskPlan, ...]
    settings: tuple[Setting, ...]

    @property
    def bytes_total(self) -> int:
        """All private pages of all tasks, in bytes."""
        return sum(task.bytes_total for task in self.tasks)

    @property
    def bytes_outside(self) -> int:
        """Those of them that go outside."""
        return sum(task.bytes_outside for task in self.tasks)

    @property
    def states(self) -> tuple[str, ...]:
        """The kinds of state of which something goes outside."""
        memory = (MEMORY,) if self.bytes_outside else ()
        return memory + tuple(dict.fromkeys(setting.kind.name for setting in self.settings))

    def inside_images(self) -> dict[str, bytes | Extents]:
        """Build the inside image set, by file name."""
        inside, draft = InsideImages(self.images), Draft(self.images)
        for task in self.tasks:
            task.put(inside, draft)
        neutralise(self.settings, draft)
        draft.put(inside)
        return inside.build()


def make_plan(images: ImageSet, outside: Sequence[str] = ("all",)) -> Plan:
    """Decide for every run of pages and every kind of state.

    Args:
        images: the image set; it must stay open as long as the plan is used.
        outside: names of kinds of state, of groups of them, or ``all``.

    Raises:
        UsageError: there is no such kind or group.
        ImagesDamaged, ImagesUnsupported: as `ImageSet.tasks`.
    """
    asked = _asked(outside)
    alive = [task for task in images.tasks if task.alive]
    inherited = _inherited(alive)
    plans = []
    for task in alive:
        assert task.memory is not None
        areas = _areas(task, inherited[task.pid], MEMORY in asked)
        plans.append(TaskPlan(task, place(task.memory.entries, areas, _late(task))))
    settings = take(images, (kind for kind in KINDS if kind.name in asked))
    return Plan(images, tuple(plans), settings)


def _asked(outside: Sequence[str]) -> set[str]:
    # The names of the kinds that are meant.
    meant = {ALL: {MEMORY}, MEMORY: {MEMORY}}
    for kind in KINDS:
        for name in (ALL, kind.name, *kind.groups):
            meant.setdefault(name, set()).add(kind.name)
    if unknown := sorted({*outside} - {*meant}):
        raise UsageError(
            f"there is no kind of state called {unknown[0]!r}",
            f"take some of: {', '.join(sorted(meant))}; `ovr states` explains them",
        )
    return {name for word in outside for name in meant[word]}


def _inherited(tasks: Sequence[Task]) -> dict[int, set[tuple[int, int]]]:
    # Areas of equal bounds in parent and child: CRIU lets the child inherit the parent's frames
    # (prepare_cow_vmas in criu/mem.c asks for more than equal bounds; we refuse a little more).
    areas = {task.pid: _bounds(task) for task in tasks}
    found: dict[int, set[tuple[int, int]]] = {task.pid: set() for task in tasks}
    for task in tasks:
        common = areas[task.pid] & areas.get(task.ppid, set())
        found[task.pid] |= common
        if common:
            found[task.ppid] |= common
    return found


def _bounds(task: Task) -> set[tuple[int, int]]:
    assert task.vmas is not None
    private = task.vmas[is_private(task.vmas)]
    return set(zip(private["start"].tolist(), private["end"].tolist(), strict=True))


def _areas(task: Task, inherited: set[tuple[int, int]], asked: bool) -> list[Area]:
    assert task.vmas is not None
    areas = []
    for vma in task.vmas[is_private(task.vmas)]:
        bounds = (int(vma["start"]), int(vma["end"]))
        reason = _verdict(int(vma["status"]), int(vma["flags"]), int(vma["prot"]))
        if reason == Reason.OUTSIDE and bounds in inherited:
            reason = Reason.INHERITED
        if reason == Reason.OUTSIDE and not asked:
            reason = Reason.NOT_ASKED
        areas.append(Area(*bounds, reason))
    return areas


def _verdict(status: int, flags: int, prot: int) -> Reason:
    if status & (VMA_AREA_VDSO | VMA_AREA_VVAR):
        return Reason.VDSO
    if status & (VMA_AREA_AIORING | VMA_AREA_SHSTK | VMA_AREA_UPROBES):
        return Reason.SPECIAL
    if status & VMA_FILE_PRIVATE:
        return Reason.FILE
    if not status & VMA_ANON_PRIVATE or flags & _MAP_TYPE == _MAP_DROPPABLE:
        return Reason.SPECIAL
    for bit, reason in (
        (MAP_GROWSDOWN, Reason.STACK),
        (_MAP_LOCKED, Reason.LOCKED),
        (_MAP_HUGETLB, Reason.HUGETLB),
    ):
        if flags & bit:
            return reason
    return Reason.OUTSIDE if prot & PROT_WRITE else Reason.READ_ONLY


def _late(task: Task) -> list[int]:
    # What the kernel or CRIU writes after the copy (research: CRIU's finalize_restore runs
    # compel_unmap on the leader's stack; the kernel updates struct rseq on the way to user mode).
    addresses = []
    for core in task.cores.values():
        sp = core.thread_info.gpregs.sp
        addresses += [sp, max(sp - _RED_ZONE, 0)]
        if core.thread_core.HasField("rseq_entry"):
            rseq = core.thread_core.rseq_entry
            addresses += [rseq.rseq_abi_pointer, rseq.rseq_abi_pointer + rseq.rseq_abi_size - 1]
    return addresses


def _as_entries(runs: NDArray[np.void]) -> NDArray[np.void]:
    kept = runs[runs["reason"] != Reason.OUTSIDE]
    entries = np.zeros(len(kept), dtype=PAGEMAP_DTYPE)
    entries["vaddr"] = kept["start"]
    entries["nr_pages"] = kept["size"] >> np.uint64(PAGE_SHIFT)
    return entries


def _populate(mm: MmEntry, outside: NDArray[np.void]) -> None:
    starts = outside["start"].tolist()
    ends = (outside["start"] + outside["size"]).tolist()
    areas: list[VmaEntry] = []
    for vma in mm.vmas:
        first = int(np.searchsorted(outside["start"], np.uint64(vma.start), side="left"))
        last = int(np.searchsorted(outside["start"], np.uint64(vma.end), side="left"))
        wanted = {*starts[first:last]}
        edges = {*starts[first:last], *ends[first:last]} - {vma.start, vma.end}
        pieces = split_vma(vma, sorted(edges)) if wanted else [vma]
        for piece in pieces:
            if piece.start in wanted:
                piece.madv |= 1 << MADV_POPULATE_WRITE
        areas += pieces
    del mm.vmas[:]
    mm.vmas.extend(areas)
