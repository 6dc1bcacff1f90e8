"""Allocate frames in the guest for the pages that go outside, and find their address spaces.

CRIU has populated pieces of areas, some of them before it forked the children that share them. The
agent touches the other pages of tasks, and maps each shared object in a process of its own, whose
page table leads to the object's pages: the restored tasks show no trace of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from ovr.attempt.alive import Alive
from ovr.attempt.origin import Origin
from ovr.attempt.shared_object import mapper, reach
from ovr.attempt.targets import Family, Target
from ovr.errors import AttemptFailed
from ovr.guest.client.agent import Agent
from ovr.guest.client.requests import Portion
from ovr.guest.protocol import Touching
from ovr.images import Memory
from ovr.images.source import Source
from ovr.kernel import (
    Kernel,
    Struct,
    anon_vma_users,
    for_each_vma,
    mm_space,
    settled,
    types_that_fit,
)
from ovr.memory.addresses import PAGE_SIZE, Gva
from ovr.memory.extents import Extents, cut_out, cut_to, total
from ovr.memory.paging import Frames
from ovr.memory.ranges import RANGE, Ranges, common, join, ranges_of, without
from ovr.plan import Plan
from ovr.plan.areas import SharedPlan, TaskPlan
from ovr.state import GuestTree

__all__ = ["Outside", "allocate_outside"]

Content = Callable[[Memory, int], Source | Origin]
"""Returns the pages of a memory at a level of its chain of dumps."""


@dataclass(frozen=True)
class Outside:
    """The memory that the plan writes outside, as found in the guest.

    Attributes:
        families: pages shared by fork.
        targets: pages of one task, and shared memory.
    """

    families: Sequence[Family]
    targets: Sequence[Target]

    @property
    def bytes(self) -> int:
        """Bytes to be written."""
        shared = sum(total(family.first.pieces) for family in self.families)
        return shared + sum(total(target.pieces) for target in self.targets)

    def without(self, there: Mapping[Origin, Ranges]) -> "Outside":
        """Return the memory without pages that are there already.

        Args:
            there: addresses of pages of tasks, not shared by fork, by the content of the task.
        """
        if not there:
            return self
        left = [
            replace(target, pieces=cut_out(target.pieces, there[target.source]))
            if isinstance(target.source, Origin) and target.source in there
            else target
            for target in self.targets
        ]
        return Outside(self.families, left)

    @property
    def all(self) -> Sequence[Target]:
        """All targets, each once."""
        shared = [
            target for family in self.families for target in (family.first, *family.descendants)
        ]
        return [*{id(target): target for target in (*shared, *self.targets)}.values()]


def allocate_outside(
    plan: Plan, guest: GuestTree, agent: Agent, content: Content, *, warm: bool = False
) -> Outside:
    """Have the guest allocate the memory that the plan writes outside, and find it.

    Args:
        plan: the plan.
        guest: the skeleton.
        agent: the agent, which holds the skeleton.
        content: returns the pages to be written.
        warm: CRIU has populated the large pieces as well.

    Raises:
        AttemptFailed: the guest is out of memory, or the skeleton is not as planned.
        GuestFault: invalid kernel objects in the guest.
        KernelNotFound: invalid types of its kernel.
        AgentUnreachable: the link broke.
    """
    restorees = {task.task.pid: _Restoree(task, guest, agent, content) for task in plan.tasks}
    families: list[Family] = []
    targets: list[Target] = []
    agent.touch(chain.from_iterable(r.portions(large=not warm) for r in restorees.values()))
    for restoree in restorees.values():
        targets += restoree.targets(restoree.plan.pieces)
    for restoree in restorees.values():
        if restoree.plan.before_fork:
            families += _families(restoree, restorees, guest)
    for shared in plan.shared:
        targets += _of_shared(shared, guest, agent, content)
    return Outside(families, targets)


class _Restoree:
    # A task of the plan, found in the guest.

    def __init__(self, plan: TaskPlan, guest: GuestTree, agent: Agent, content: Content) -> None:
        self.plan = plan
        with types_that_fit():
            task = guest.task(plan.task.pid)
            self.mm: Struct = task.mm
            self.space = mm_space(guest.kernel, self.mm)
            self._pid: int = task.tgid
            self.check = Alive(f"pid {plan.task.pid}", guest.kernel, task, self.space)
        self._kernel = guest.kernel
        self._agent = agent
        self._content = content

    def targets(
        self, pieces: Mapping[int, Extents], frames: Frames | None = None
    ) -> Iterator[Target]:
        for level, here in pieces.items():
            if len(here):
                yield Target(
                    name=f"pid {self.plan.task.pid}",
                    space=self.space,
                    frames=frames or self._kernel.private_frames,
                    pieces=here,
                    source=self._content(self.plan.memory, level),
                    ask=self._ask,
                    check=self.check,
                    spared=self.plan.spared,
                )

    def _ask(self, pieces: Extents) -> None:
        self._agent.touch([Portion(self._pid, Touching.KEEP, pieces[["gva", "size"]].tolist())])

    def portions(self, *, large: bool) -> Iterator[Portion]:
        """Yield the pages that the agent is to allocate."""
        ranges = [self.plan.to_touch()]
        if large and len(self.plan.large_pieces):
            # Pages that the kernel may have written to must keep their content: page by page.
            kept = _pages_of(self.plan.spared)
            ranges += [without(self.plan.large_pieces, kept), common(self.plan.large_pieces, kept)]
        for one in ranges:
            if len(one):
                yield from _portions(one, self.plan.spared, self._pid)


def _families(
    first: _Restoree, restorees: Mapping[int, _Restoree], guest: GuestTree
) -> Iterator[Family]:
    pid = first.plan.task.pid
    sharing = {r: r.plan.sharing for r in restorees.values() if r is not first}
    descendants = [
        target
        for descendant, with_whom in sharing.items()
        if pid in with_whom.from_root
        for target in descendant.targets(descendant.plan.inherited(pid))
    ]
    excluded = [(r.space, s.dropped) for r, s in sharing.items() if len(s.dropped)]
    ours = {restoree.mm.address_ for restoree in restorees.values()}
    for anon_vma, ranges in _anon_vmas(first).items():
        frames = _frames_of_the_tree(guest.kernel, anon_vma, ours, pid)
        pieces = {
            level: cut_to(part, ranges["start"], ranges["end"])
            for level, part in first.plan.before_fork.items()
        }
        for target in first.targets(pieces, frames):
            yield Family(target, descendants, excluded)


def _anon_vmas(restoree: _Restoree) -> dict[Gva, Ranges]:
    # The ranges of the task's pages allocated before the fork, by the anon_vma of their area.
    found: dict[Gva, list[tuple[int, int]]] = {}
    seed = restoree.plan.sharing.cow.before_fork
    for start, end, anon_vma in settled(lambda: _areas(restoree.mm)):
        at = int(np.searchsorted(seed["end"], np.uint64(start), side="right"))
        if at < len(seed) and int(seed["start"][at]) < end:
            found.setdefault(anon_vma, []).append((start, end))
    return {anon: join(np.array(rows, dtype=RANGE)) for anon, rows in found.items()}


def _areas(mm: Struct) -> list[tuple[int, int, Gva]]:
    return [(vma.vm_start, vma.vm_end, vma.anon_vma.address_) for vma in for_each_vma(mm)]


@types_that_fit()
def _frames_of_the_tree(kernel: Kernel, anon_vma: Gva, ours: set[Gva], pid: int) -> Frames:
    # All tasks of the tree are stopped: the anon_vma gets no further users.
    users = anon_vma_users(kernel.object("struct anon_vma", anon_vma)) if anon_vma else set()
    if not anon_vma or not users <= ours:
        raise AttemptFailed(
            f"pid {pid}: memory that it should share with its children was not allocated, or is"
            " shared with others",
            "the guest may be out of memory; free some and restore again",
        )
    return kernel.anon_frames(anon_vma)


def _portions(ranges: Ranges, spared: Ranges, pid: int) -> Iterator[Portion]:
    # Pages that the kernel may have written to must keep their content.
    precious = _overlaps(ranges, spared)
    for how in (Touching.DISCARD, Touching.KEEP):
        chosen = ranges[precious == (how == Touching.KEEP)]
        if len(chosen):
            yield Portion(pid, how, _starts_and_sizes(chosen))


def _starts_and_sizes(ranges: Ranges) -> list[tuple[int, int]]:
    sizes = (ranges["end"] - ranges["start"]).tolist()
    return [*zip(ranges["start"].tolist(), sizes, strict=True)]


def _pages_of(ranges: Ranges) -> Ranges:
    # The pages with a byte in one of the ranges.
    page = np.uint64(PAGE_SIZE)
    last = (ranges["end"] + page - np.uint64(1)) // page * page
    return join(ranges_of(ranges["start"] // page * page, last))


def _overlaps(ranges: Ranges, others: Ranges) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    # The ranges that have a page in common with one of the others; both are sorted.
    low = others["start"] // np.uint64(PAGE_SIZE) * np.uint64(PAGE_SIZE)
    first = np.searchsorted(others["end"], ranges["start"], side="right")
    last = np.searchsorted(low, ranges["end"], side="left")
    return first < last


def _of_shared(
    plan: SharedPlan, guest: GuestTree, agent: Agent, content: Content
) -> Iterator[Target]:
    if not plan.bytes_outside:
        return
    there = reach(plan.shared, guest)
    ranges = plan.to_touch()
    if not len(ranges) or int(ranges["end"][-1]) > there.size:
        raise AttemptFailed(
            f"shared memory {plan.shared.shmid}: {there.size} bytes in the guest, fewer than in the"
            " images",
            "report it, with the images",
        )
    mapped = agent.map(there.pid, there.way, there.size, _starts_and_sizes(ranges))
    name = f"shared memory {plan.shared.shmid}"
    check = mapper(name, guest.kernel, mapped.pid)

    def ask(pieces: Extents) -> None:
        agent.touch([Portion(mapped.pid, Touching.KEEP, pieces[["gva", "size"]].tolist())])

    for level, pieces in plan.pieces.items():
        here = pieces.copy()
        here["gva"] += np.uint64(mapped.address)
        yield Target(
            name=name,
            space=check.space,
            frames=guest.kernel.shared_frames(there.mapping),
            pieces=here,
            source=content(plan.memory, level),
            ask=ask,
            check=check,
        )
