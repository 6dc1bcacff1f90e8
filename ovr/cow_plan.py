"""What of a tree's memory is allocated before its children are made, so that they share it.

CRIU leaves a page shared by parent and child if its images have the same content for it in both.
For a server of twenty workers that would mean to send the same pages twenty times, and CRIU to
compare them one by one. Instead, the first ancestor that has an area is asked to populate pieces
of it when it maps them (``MAP_POPULATE`` in ``VmaEntry.flags``; ``premap_private_vma`` of
criu/mem.c maps them before it forks), none of these pages is in the images, and what is written
into them from outside is seen by all who inherited them. Who has something else there gets a page
of its own when the agent touches it; who has nothing there has the piece dropped
(``MADV_DONTNEED_LOCKED`` in ``VmaEntry.madv``), after the children were made.

What is shared by descendants only, and not with that first ancestor, is left to CRIU and its
images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from ovr.addresses import PAGE_SIZE
from ovr.images import Task
from ovr.images.cow import Inheritance, zero_pages
from ovr.images.runs import ends_of
from ovr.placement import Cow
from ovr.ranges import Ranges, common, join, no_ranges, ranges_of, without

__all__ = ["CowPlan", "Sharing", "plan_cow"]

# Each piece is an area of its own to CRIU, in every task of the family.
_SMALLEST: Final = 16 * PAGE_SIZE
_MOST: Final = 1024


@dataclass(frozen=True)
class Sharing:
    """One task's part.

    Attributes:
        cow: what it shares.
        dropped: what it inherits without having pages there.
        from_root: what it inherits and has, by the pid of who has it written.
    """

    cow: Cow = field(default_factory=Cow)
    dropped: Ranges = field(default_factory=no_ranges)
    from_root: Mapping[int, Ranges] = field(default_factory=dict)


@dataclass(frozen=True)
class CowPlan:
    """The sharing of a tree.

    Attributes:
        tasks: by pid.
        edges: pieces of the areas that are inherited, by pid of the ancestor.
        rooted: the areas that each task inherits, by pid and then by pid of the ancestor.
    """

    tasks: Mapping[int, Sharing]
    edges: Mapping[int, Sequence[Ranges]]
    rooted: Mapping[int, Mapping[int, Ranges]]

    def heirs(self, pid: int) -> Ranges:
        """Return the areas that others inherit from a task that has them first."""
        return join(*(roots[pid] for roots in self.rooted.values() if pid in roots))


def plan_cow(
    tasks: Sequence[Task],
    inherited: Mapping[int, Inheritance],
    allowed: Callable[[Task], Ranges],
) -> CowPlan:
    """Decide what is shared how.

    Args:
        tasks: those that are alive, parents first.
        inherited: what each has of its parent.
        allowed: the areas of a task whose pages go outside and that may be cut.
    """
    rooted = _rooted(tasks, inherited)
    chained = _chained(tasks, inherited, rooted)
    # Of what is shared only further down CRIU compares what its images have with what is in memory:
    # zeros still, where the ancestor has populated. Zeros in the images would be taken for that.
    deep = join(
        *(
            zero_pages(task, without(inherited[task.pid].equal, chained[task.pid]))
            for task in tasks
            if task.pid in inherited
        )
    )
    families = _families(tasks, rooted)
    seeds = {}
    for root, family in families.items():
        seed = join(*(common(chained[task.pid], areas) for task, areas in family[1:]))
        seeds[root] = _seed(without(seed, deep), family, allowed)
    return _plan(tasks, inherited, rooted, chained, seeds)


Family = list[tuple[Task, Ranges]]
"""The first ancestor, and the heirs with the areas that they have of it."""


def _families(
    tasks: Sequence[Task], rooted: Mapping[int, Mapping[int, Ranges]]
) -> dict[int, Family]:
    found: dict[int, Family] = {}
    for task in tasks:
        for root, areas in rooted[task.pid].items():
            found.setdefault(root, []).append((task, areas))
    by_pid = {task.pid: task for task in tasks}
    return {root: [(by_pid[root], no_ranges()), *heirs] for root, heirs in found.items()}


def _rooted(
    tasks: Sequence[Task], inherited: Mapping[int, Inheritance]
) -> dict[int, dict[int, Ranges]]:
    # For each task, by pid of the first ancestor that has them, the areas that it inherits.
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
    # For each task the pages that are equal all the way up to the first ancestor.
    found: dict[int, Ranges] = {}
    for task in tasks:
        if task.pid not in inherited:
            found[task.pid] = no_ranges()
            continue
        from_parent = rooted[task.pid].get(task.ppid, no_ranges())
        found[task.pid] = common(inherited[task.pid].equal, join(from_parent, found[task.ppid]))
    return found


def _seed(seed: Ranges, family: Family, allowed: Callable[[Task], Ranges]) -> Ranges:
    # What the ancestor populates before it makes children: in large pieces, and nothing of which
    # CRIU would have to compare or keep something in any of the family.
    seed = without(seed, join(*(_rseq_pages(task) for task, _ in family)))
    seed = common(seed, allowed(family[0][0]))
    for task, areas in family[1:]:
        seed = without(seed, without(areas, allowed(task)))
    seed = _large(seed)
    for task, areas in family[1:]:
        dropped = without(common(seed, areas), _pages(task))
        seed = without(seed, without(dropped, _large(dropped)))
    return _large(seed)


def _plan(
    tasks: Sequence[Task],
    inherited: Mapping[int, Inheritance],
    rooted: Mapping[int, Mapping[int, Ranges]],
    chained: Mapping[int, Ranges],
    seeds: Mapping[int, Ranges],
) -> CowPlan:
    edges = {root: [seed] for root, seed in seeds.items()}
    found: dict[int, Sharing] = {}
    inside: dict[int, Ranges] = {}
    for task in tasks:
        roots, pages = rooted[task.pid], _pages(task)
        here = {root: common(seeds[root], areas) for root, areas in roots.items()}
        from_root = {root: common(chained[task.pid], seed) for root, seed in here.items()}
        dropped = without(join(*here.values()), pages)
        for root, seed in here.items():
            edges[root].append(common(dropped, seed))
        cow = Cow(
            inherited=join(*from_root.values()),
            bequeathed=join(seeds.get(task.pid, no_ranges())),
        )
        found[task.pid] = Sharing(cow, dropped, {r: s for r, s in from_root.items() if len(s)})
        if task.pid in inherited:
            kept = without(inherited[task.pid].equal, cow.inherited)
            for pid in (task.pid, task.ppid):
                inside[pid] = join(inside.get(pid, no_ranges()), kept)
    sharing = {
        pid: Sharing(
            Cow(one.cow.inherited, one.cow.bequeathed, inside.get(pid, no_ranges())),
            one.dropped,
            one.from_root,
        )
        for pid, one in found.items()
    }
    return CowPlan(sharing, edges, rooted)


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
    return join(ranges_of(entries["vaddr"], ends_of(entries)))


def _rseq_pages(task: Task) -> Ranges:
    # The kernel writes there, and so makes them the task's own.
    areas, page = task.rseq_areas, np.uint64(PAGE_SIZE)
    ends = (areas["end"] + page - np.uint64(1)) // page * page
    return join(ranges_of(areas["start"] // page * page, ends))
