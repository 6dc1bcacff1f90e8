"""Find the pages that CRIU leaves shared copy-on-write by parent and child.

CRIU lets a child inherit an area from its parent if both have it at the same address and of the
same kind (``prepare_cow_vmas``, ``check_cow_vmas`` of criu/mem.c). In such an area it compares page
by page, leaves equal pages shared and gives the child pages of its own for the rest
(``restore_priv_vma_content``), whatever was shared before the dump. This module applies the same
rules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ovr._fastcopy import PAIR, equal_pages
from ovr.images.source import Sources, readable
from ovr.images.task import Memory, Task
from ovr.images.vma import MAP_ANONYMOUS, MAP_GROWSDOWN, VMA_FILE_PRIVATE, Vmas, is_private
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.extents import Extents, cut_to, ends_of, pages_in
from ovr.memory.ranges import RANGE, Ranges, ranges_of

__all__ = ["Contents", "ImageContents", "Inheritance", "inheritance"]


class Contents(Protocol):
    """Compares pages."""

    def equal(self, own: Memory, theirs: Memory, areas: Vmas) -> Ranges:
        """Return the pages in some areas that are equal in two memories, neighbours joined."""

    def zeros(self, task: Task, ranges: Ranges) -> Ranges:
        """Return the pages of a task in `ranges` that are filled with zeros."""


@dataclass(frozen=True)
class Inheritance:
    """Areas and pages that a task inherits from its parent.

    Attributes:
        areas: the areas that CRIU lets it inherit, a `RANGE` array.
        equal: the pages in them that are equal in both, neighbours joined.
    """

    areas: Ranges
    equal: Ranges


def inheritance(tasks: Sequence[Task], contents: Contents) -> Mapping[int, Inheritance]:
    """Return the inheritance of each task by pid; tasks whose parent is not in `tasks` have none.

    Args:
        tasks: the live tasks of one image set.
        contents: compares their pages.

    Raises:
        ImagesDamaged: a pages image became shorter, or cannot be read.
    """
    by_pid = {task.pid: task for task in tasks}
    found: dict[int, Inheritance] = {}
    for task in tasks:
        parent = by_pid.get(task.ppid)
        if parent is not None:
            areas = _inherited(task, parent)
            assert task.memory is not None and parent.memory is not None
            equal = contents.equal(task.memory, parent.memory, areas)
            found[task.pid] = Inheritance(ranges_of(areas["start"], areas["end"]), equal)
    return found


class ImageContents:
    """Compares pages in the images.

    Its functions raise `ImagesDamaged` if a pages image became shorter, or cannot be read.
    """

    def equal(self, own: Memory, theirs: Memory, areas: Vmas) -> Ranges:
        """Return the pages in some areas that are equal in two memories, neighbours joined."""
        with Sources() as sources:
            return _equal(own, theirs, areas, sources)

    def zeros(self, task: Task, ranges: Ranges) -> Ranges:
        """Return the pages of a task in `ranges` that are filled with zeros."""
        return _zero_pages(task, ranges)


def _zero_pages(task: Task, ranges: Ranges) -> Ranges:
    assert task.memory is not None
    runs = cut_to(task.memory.entries, ranges["start"], ranges["end"])
    run_of_page = np.repeat(np.arange(len(runs)), pages_in(runs))
    zero = np.zeros(len(run_of_page), dtype=bool)
    with Sources() as sources:
        for level in np.unique(runs["level"]).tolist():
            pages = _page_by_page(runs[runs["level"] == level])
            source = sources.of(task.memory, level)
            here = (runs["level"] == level)[run_of_page]
            with readable(task.memory.pages_name):
                zero[here] = equal_pages(source.pages, bytes(PAGE_SIZE), pages)
    return _as_ranges(runs, run_of_page, zero)


def _page_by_page(runs: Extents) -> NDArray[np.void]:
    # One pair a page: `other` stays 0, the offset of the single page compared with.
    counts = pages_in(runs)
    nth = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    pairs = np.zeros(len(nth), dtype=PAIR)
    pairs["one"] = np.repeat(runs["offset"], counts) + nth * PAGE_SIZE
    pairs["size"] = PAGE_SIZE
    return pairs


def _inherited(task: Task, parent: Task) -> Vmas:
    assert task.mm is not None and parent.mm is not None
    assert task.vmas is not None and parent.vmas is not None
    own, theirs = task.vmas[is_private(task.vmas)], parent.vmas[is_private(parent.vmas)]
    if task.mm.exe_file_id != parent.mm.exe_file_id:
        return own[:0]
    _, mine, his = np.intersect1d(own["start"], theirs["start"], return_indices=True)
    inherited: Vmas = own[mine][_alike(own[mine], theirs[his])]
    return inherited


def _alike(own: Vmas, theirs: Vmas) -> NDArray[np.bool_]:
    kind = np.uint32(MAP_GROWSDOWN | MAP_ANONYMOUS)
    same: NDArray[np.bool_] = own["end"] == theirs["end"]
    same &= (own["flags"] ^ theirs["flags"]) & kind == 0
    same &= (own["status"] & VMA_FILE_PRIVATE == 0) | (own["shmid"] == theirs["shmid"])
    return same


def _equal(own: Memory, theirs: Memory, areas: Vmas, sources: Sources) -> Ranges:
    within = np.ascontiguousarray(areas["start"]), np.ascontiguousarray(areas["end"])
    other = cut_to(theirs.entries, *within)
    # Cut both at each other's borders: then they are the same runs of pages.
    mine = cut_to(cut_to(own.entries, *within), other["gva"], ends_of(other))
    other = cut_to(other, mine["gva"], ends_of(mine))
    levels = np.stack([mine["level"], other["level"]], axis=1)
    run_of_page = np.repeat(np.arange(len(mine)), pages_in(mine))
    equal = np.zeros(len(run_of_page), dtype=bool)
    for one, two in np.unique(levels, axis=0).tolist():
        here = (levels == (one, two)).all(axis=1)
        pair = sources.of(own, one).pages, sources.of(theirs, two).pages
        with readable(f"{own.pages_name} or {theirs.pages_name}"):
            equal[here[run_of_page]] = equal_pages(*pair, _pairs(mine[here], other[here]))
    return _as_ranges(mine, run_of_page, equal)


def _pairs(mine: Extents, other: Extents) -> NDArray[np.void]:
    pairs = np.empty(len(mine), dtype=PAIR)
    pairs["one"], pairs["other"] = mine["offset"], other["offset"]
    pairs["size"] = mine["size"]
    return pairs


def _as_ranges(runs: Extents, run_of_page: NDArray[np.int64], equal: NDArray[np.bool_]) -> Ranges:
    # The equal pages, neighbours joined.
    before = np.cumsum(pages_in(runs)) - pages_in(runs)
    nth = (np.arange(len(equal)) - before[run_of_page]).astype(np.uint64)
    page = (runs["gva"][run_of_page] + nth * np.uint64(PAGE_SIZE))[equal]
    breaks = np.flatnonzero(page[1:] != page[:-1] + np.uint64(PAGE_SIZE))
    found = np.empty(len(breaks) + 1 if len(page) else 0, dtype=RANGE)
    if len(page):
        found["start"] = page[np.append(0, breaks + 1)]
        found["end"] = page[np.append(breaks, len(page) - 1)] + np.uint64(PAGE_SIZE)
    return found
