"""Plan memory that a parent allocates before fork, shared copy-on-write by its children.

CRIU leaves a page shared by parent and child if the images have the same content for both. For a
server with twenty workers the same pages would be sent twenty times, and CRIU would compare them
one by one. Instead, the first ancestor that has an area populates pieces of it when CRIU maps them
(``MAP_POPULATE`` in ``VmaEntry.flags``; ``premap_private_vma`` of criu/mem.c maps them before it
forks). None of these pages is in the inside images; each is written once from outside, for all
tasks that inherit it. A descendant with other content gets its own page when the agent touches it.
A descendant without a page there drops the piece (``MADV_DONTNEED_LOCKED`` in ``VmaEntry.madv``)
after its children have been forked.

Pages that only descendants share, without that first ancestor, are left to CRIU and its images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from ovr.images import Task
from ovr.images.cow import Contents, Inheritance
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.extents import addresses_of
from ovr.memory.ranges import Ranges, common, join, no_ranges, ranges_of, without
from ovr.plan.pages import Cow

__all__ = ["CowPlan", "Sharing", "plan_cow"]

# Each piece is an area of its own to CRIU, in every task of the family.
_SMALLEST: Final = 16 * PAGE_SIZE
_MOST: Final = 1024


@dataclass(frozen=True)
class Sharing:
    """The pages that one task shares by fork.

    Attributes:
        cow: the shared ranges.
        dropped: inherited ranges where the task has no pages.
        from_root: inherited pages of the task, by pid of the ancestor for which they are written.
    """

    cow: Cow = field(default_factory=Cow)
    dropped: Ranges = field(default_factory=no_ranges)
    from_root: Mapping[int, Ranges] = field(default_factory=dict)


@dataclass(frozen=True)
class CowPlan:
    """The sharing of a tree.

    Attributes:
        tasks: the sharing of each task, by pid.
        edges: pieces at whose borders inherited areas are cut, by pid of the ancestor.
        rooted: the areas that each task inherits, by its pid and then by pid of the ancestor.
    """

    tasks: Mapping[int, Sharing]
    edges: Mapping[int, Sequence[Ranges]]
    rooted: Mapping[int, Mapping[int, Ranges]]

    def inherited_from(self, pid: int) -> Ranges:
        """Return the areas that other tasks inherit from a task that is their first ancestor."""
        return join(*(roots[pid] for roots in self.rooted.values() if pid in roots))


def plan_cow(
    tasks: Sequence[Task],
    inherited: Mapping[int, Inheritance],
    allowed: Callable[[Task], Ranges],
    contents: Contents,
) -> CowPlan:
    """Plan the sharing of a tree.

    Args:
        tasks: the live tasks, parents first.
        inherited: the inheritance of each from its parent, by pid.
        allowed: returns the areas of a task whose pages go outside and that may be cut.
        contents: compares their pages.
    """
    lineage = _lineage(tasks, inherited, contents)
    seeds = {}
    for root, family in _families(lineage).items():
        seed = join(*(common(lineage.chained[task.pid], areas) for task, areas in family[1:]))
        seeds[root] = _seed(without(seed, lineage.zeros), family, allowed)
    return _plan(lineage, _leave_one_page(lineage, seeds))


@dataclass(frozen=True)
class _Lineage:
    # Attributes, by pid: `inherited`; `rooted`: the areas that a task inherits, by pid of the first
    # ancestor that has them; `chained`: the pages that are equal in all tasks up to that one.
    # `zeros`: pages of zeros that only descendants share. CRIU compares the content in its images
    # with memory, which is zero too where an ancestor has populated it, so CRIU would take these
    # pages for the ancestor's.
    tasks: Mapping[int, Task]
    inherited: Mapping[int, Inheritance]
    rooted: Mapping[int, Mapping[int, Ranges]]
    chained: Mapping[int, Ranges]
    zeros: Ranges


def _lineage(
    tasks: Sequence[Task], inherited: Mapping[int, Inheritance], contents: Contents
) -> _Lineage:
    rooted = _rooted(tasks, inherited)
    chained = _chained(tasks, inherited, rooted)
    deep = {
        task.pid: without(inherited[task.pid].equal, chained[task.pid])
        for task in tasks
        if task.pid in inherited
    }
    by_pid = {task.pid: task for task in tasks}
    zeros = join(*(contents.zeros(by_pid[pid], ranges) for pid, ranges in deep.items()))
    return _Lineage(by_pid, inherited, rooted, chained, zeros)


Family = list[tuple[Task, Ranges]]
"""The first ancestor, then its descendants, each with the areas that it inherits."""


def _families(lineage: _Lineage) -> dict[int, Family]:
    found: dict[int, Family] = {}
    for pid, task in lineage.tasks.items():
        for root, areas in lineage.rooted[pid].items():
            found.setdefault(root, []).append((task, areas))
    return {
        root: [(lineage.tasks[root], no_ranges()), *descendants]
        for root, descendants in found.items()
    }


def _rooted(
    tasks: Sequence[Task], inherited: Mapping[int, Inheritance]
) -> dict[int, dict[int, Ranges]]:
    # The areas that each task inherits, by its pid and then by pid of their first ancestor.
    found: dict[int, dict[int, Ranges]] = {}
    for task in tasks:
        own = found[task.pid] = {}
        if task.pid not in inherited:
            continue
        areas = inherited[task.pid].areas
        grand = inherited.get(task.ppid)
        own[task.ppid] = without(areas, grand.areas) if grand else join(areas)
        for root, ranges in found[task.ppid].items():
            own[root] = common(areas, ranges)
        found[task.pid] = {root: ranges for root, ranges in own.items() if len(ranges)}
    return found


def _chained(
    tasks: Sequence[Task],
    inherited: Mapping[int, Inheritance],
    rooted: Mapping[int, Mapping[int, Ranges]],
) -> dict[int, Ranges]:
    # The pages of each task that are equal in all tasks up to the first ancestor.
    found: dict[int, Ranges] = {}
    for task in tasks:
        if task.pid not in inherited:
            found[task.pid] = no_ranges()
            continue
        from_parent = rooted[task.pid].get(task.ppid, no_ranges())
        found[task.pid] = common(inherited[task.pid].equal, join(from_parent, found[task.ppid]))
    return found


def _seed(seed: Ranges, family: Family, allowed: Callable[[Task], Ranges]) -> Ranges:
    # The ranges that the ancestor populates before it forks: large pieces, without pages that CRIU
    # has to compare or keep in any task of the family.
    seed = without(seed, join(*(_rseq_pages(task) for task, _ in family)))
    seed = common(seed, allowed(family[0][0]))
    for task, areas in family[1:]:
        seed = without(seed, without(areas, allowed(task)))
    seed = _large(seed)
    for task, areas in family[1:]:
        dropped = without(common(seed, areas), _pages(task))
        seed = without(seed, without(dropped, _large(dropped)))
    return _large(seed)


def _leave_one_page(lineage: _Lineage, seeds: dict[int, Ranges]) -> dict[int, Ranges]:
    # One page of each task always stays inside (`pages._anchor`).
    for pid, task in lineage.tasks.items():
        populated = _populated(seeds, pid, _heritage(lineage, seeds, pid))
        if not len(populated):
            continue
        pages = _pages(task)
        if len(pages) and not len(without(pages, populated)):
            page = ranges_of(pages["start"][:1], pages["start"][:1] + np.uint64(PAGE_SIZE))
            for root in {pid, *lineage.rooted[pid]} & seeds.keys():
                seeds[root] = _large(without(seeds[root], page))
    return seeds


def _heritage(lineage: _Lineage, seeds: Mapping[int, Ranges], pid: int) -> dict[int, Ranges]:
    # The ranges that ancestors populate in areas that a task inherits, by pid of the ancestor.
    return {root: common(seeds[root], areas) for root, areas in lineage.rooted[pid].items()}


def _populated(seeds: Mapping[int, Ranges], pid: int, heritage: Mapping[int, Ranges]) -> Ranges:
    return join(seeds.get(pid, no_ranges()), *heritage.values())


def _plan(lineage: _Lineage, seeds: Mapping[int, Ranges]) -> CowPlan:
    edges = {root: [seed] for root, seed in seeds.items()}
    inherited: dict[int, Ranges] = {}
    found: dict[int, Sharing] = {}
    for pid, task in lineage.tasks.items():
        here = _heritage(lineage, seeds, pid)
        shared = {root: common(lineage.chained[pid], seed) for root, seed in here.items()}
        dropped = without(join(*here.values()), _pages(task))
        for root, seed in here.items():
            edges[root].append(common(dropped, seed))
        inherited[pid] = join(*shared.values())
        cow = Cow(
            inherited[pid],
            join(seeds.get(pid, no_ranges())),
            populated=_populated(seeds, pid, here),
        )
        found[pid] = Sharing(cow, dropped, {r: s for r, s in shared.items() if len(s)})
    inside = _inside(lineage, inherited)
    sharing = {
        pid: replace(one, cow=replace(one.cow, inside=inside[pid])) for pid, one in found.items()
    }
    return CowPlan(sharing, edges, lineage.rooted)


def _inside(lineage: _Lineage, written: Mapping[int, Ranges]) -> dict[int, Ranges]:
    # The shared pages that CRIU restores from its images, in parents and in children.
    inside = dict.fromkeys(lineage.tasks, no_ranges())
    for pid, inheritance in lineage.inherited.items():
        kept = without(inheritance.equal, written[pid])
        for user in (pid, lineage.tasks[pid].ppid):
            inside[user] = join(inside[user], kept)
    for pid, inheritance in lineage.inherited.items():
        # A page of zeros for which the parent has other content: the parent's page must be in the
        # images, or CRIU finds no difference and gives the child no page of its own.
        parent = lineage.tasks[lineage.tasks[pid].ppid]
        zeros = common(common(inside[pid], lineage.zeros), inheritance.areas)
        inside[parent.pid] = join(inside[parent.pid], common(zeros, _pages(parent)))
    return inside


def _large(ranges: Ranges) -> Ranges:
    sizes = ranges["end"] - ranges["start"]
    large: Ranges = ranges[sizes >= _SMALLEST]
    if len(large) > _MOST:
        order = np.argsort(large["end"] - large["start"])
        large = np.sort(large[order[-_MOST:]], order="start")
    return large


def _pages(task: Task) -> Ranges:
    assert task.memory is not None
    entries = task.memory.entries
    return addresses_of(entries)


def _rseq_pages(task: Task) -> Ranges:
    # The kernel writes to these pages, which unshares them.
    areas, page = task.rseq_areas, np.uint64(PAGE_SIZE)
    ends = (areas["end"] + page - np.uint64(1)) // page * page
    return join(ranges_of(areas["start"] // page * page, ends))
