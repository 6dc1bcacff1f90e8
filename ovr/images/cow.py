"""What CRIU lets parent and child share copy-on-write, found as CRIU finds it.

CRIU has a child inherit an area from its parent if both have it at the same place and of the same
kind (``prepare_cow_vmas``, ``check_cow_vmas`` of criu/mem.c); of such an area it leaves shared what
is equal in both, page by page, and gives the child pages of its own for the rest
(``restore_priv_vma_content``). Whatever it was before the dump, that is what an area is afterwards.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ovr._fastcopy import PAIR, equal_pages
from ovr.addresses import PAGE_SHIFT, PAGE_SIZE
from ovr.images.pagemap import Entries
from ovr.images.runs import clip, ends_of
from ovr.images.source import Sources
from ovr.images.task import Memory, Task
from ovr.images.vma import MAP_ANONYMOUS, MAP_GROWSDOWN, VMA_FILE_PRIVATE, Vmas, is_private

__all__ = ["PageRanges", "shared_with_parents"]

PageRanges = NDArray[np.uint64]
"""Rows of start and end: half-open, in bytes."""


def shared_with_parents(tasks: Sequence[Task]) -> dict[int, list[PageRanges]]:
    """Find what each task shares with its parent and with its children.

    Args:
        tasks: those that are alive, of one image set.

    Returns:
        Rows of ranges by pid, unsorted; nothing for a task that shares nothing.

    Raises:
        ImagesDamaged: a pages image is no longer as long as it was.
    """
    by_pid = {task.pid: task for task in tasks}
    found: dict[int, list[PageRanges]] = {}
    with Sources() as sources:
        for task in tasks:
            parent = by_pid.get(task.ppid)
            if parent is None:
                continue
            areas = _inherited(task, parent)
            assert task.memory is not None and parent.memory is not None
            if len(equal := _equal(task.memory, parent.memory, areas, sources)):
                found.setdefault(task.pid, []).append(equal)
                found.setdefault(parent.pid, []).append(equal)
    return found


def _inherited(task: Task, parent: Task) -> Vmas:
    # The areas that CRIU lets the child have of its parent.
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


def _equal(own: Memory, theirs: Memory, areas: Vmas, sources: Sources) -> PageRanges:
    within = np.ascontiguousarray(areas["start"]), np.ascontiguousarray(areas["end"])
    other = clip(theirs.entries, *within)
    # Cut both at each other's borders: then they are the same runs of pages.
    mine = clip(clip(own.entries, *within), other["vaddr"], ends_of(other))
    other = clip(other, mine["vaddr"], ends_of(mine))
    levels = np.stack([mine["level"], other["level"]], axis=1)
    run_of_page = np.repeat(np.arange(len(mine)), mine["nr_pages"].astype(np.int64))
    equal = np.zeros(len(run_of_page), dtype=bool)
    for one, two in np.unique(levels, axis=0).tolist():
        here = (levels == (one, two)).all(axis=1)
        pair = sources.of(own, one), sources.of(theirs, two)
        equal[here[run_of_page]] = equal_pages(*pair, _pairs(mine[here], other[here]))
    return _as_ranges(mine, run_of_page, equal)


def _pairs(mine: Entries, other: Entries) -> NDArray[np.void]:
    pairs = np.empty(len(mine), dtype=PAIR)
    pairs["one"], pairs["other"] = mine["offset"], other["offset"]
    pairs["size"] = mine["nr_pages"] << np.uint64(PAGE_SHIFT)
    return pairs


def _as_ranges(
    runs: Entries, run_of_page: NDArray[np.int64], equal: NDArray[np.bool_]
) -> PageRanges:
    # The equal pages, neighbours joined.
    before = (np.cumsum(runs["nr_pages"]) - runs["nr_pages"]).astype(np.int64)
    nth = (np.arange(len(equal)) - before[run_of_page]).astype(np.uint64)
    page = (runs["vaddr"][run_of_page] + nth * np.uint64(PAGE_SIZE))[equal]
    breaks = np.flatnonzero(page[1:] != page[:-1] + np.uint64(PAGE_SIZE))
    starts = page[np.append(0, breaks + 1)[: len(page)]]
    ends = page[np.append(breaks, len(page) - 1)[: len(page)]] + np.uint64(PAGE_SIZE)
    return np.stack([starts, ends], axis=1)
