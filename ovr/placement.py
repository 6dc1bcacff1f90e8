"""Which pages of a task go outside, which stay inside, and why: the array part of the plan.

A task's pagemap is cut where the verdict may change (VMA borders, single pages that the kernel or
CRIU touches late), each cut is judged by its VMA, and neighbours with the same verdict become one
run again. All of it on numpy arrays: a fragmented process has more than a million entries.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ovr.addresses import PAGE_SIZE

__all__ = ["PLACED", "Area", "Reason", "place"]


class Reason(IntEnum):
    """Why a run of pages stays inside; `OUTSIDE` is the one that does not."""

    OUTSIDE = 0
    VDSO = 1
    FILE = 2
    SHARED = 3
    READ_ONLY = 4
    STACK = 5
    LOCKED = 6
    HUGETLB = 7
    SPECIAL = 8
    INHERITED = 9
    LATE = 10
    FRAGMENTED = 11
    NOT_ASKED = 12
    ANCHOR = 13

    @property
    def text(self) -> str:
        """One line for people."""
        return _TEXTS[self]


_TEXTS: Final = {
    Reason.OUTSIDE: "private anonymous memory of this task alone",
    Reason.VDSO: "vDSO or vvar: CRIU matches it with the guest kernel's own",
    Reason.FILE: "private file mapping: a frame may belong to the page cache",
    Reason.SHARED: "shared memory: its frames are not the task's own",
    Reason.READ_ONLY: "not writable: CRIU cannot be asked to allocate it empty",
    Reason.STACK: "stack: CRIU's last step runs on it",
    Reason.LOCKED: "locked memory",
    Reason.HUGETLB: "hugetlb pages",
    Reason.SPECIAL: "special area (AIO ring, shadow stack, guard, droppable)",
    Reason.INHERITED: "may be shared copy-on-write by parent and child",
    Reason.LATE: "touched by kernel or CRIU after the copy (rseq, stack pointer)",
    Reason.FRAGMENTED: "one of very many small runs in its area",
    Reason.NOT_ASKED: "memory was not asked for (--outside)",
    Reason.ANCHOR: "CRIU cannot restore a task without any page of its own",
}

PLACED = np.dtype(
    [("start", "<u8"), ("size", "<u8"), ("offset", "<i8"), ("level", "<u4"), ("reason", "<u1")]
)
"""A run of pages: GVA and size in bytes, position in the pages image of that level (0: the image
set's own, 1: its parent's, …), a `Reason`."""

# More runs than this in one area would mean as many entries in mm.img and as many madvise calls.
# The largest go outside; what is left is small.
_MAX_RUNS_PER_AREA: Final = 1024


@dataclass(frozen=True)
class Area:
    """A VMA of the images, with the verdict on its pages. Half-open, in bytes."""

    start: int
    end: int
    reason: Reason


def place(
    pagemap: NDArray[np.void], areas: Sequence[Area], late: Iterable[int]
) -> NDArray[np.void]:
    """Return the `PLACED` runs of one task, sorted by address.

    Args:
        pagemap: entries of dtype `images.PAGEMAP_DTYPE`, sorted, all with data in an image.
        areas: the task's private VMAs, sorted; every entry lies inside of them.
        late: GVAs whose pages are touched after the copy.
    """
    late_pages = np.unique(np.array([gva & -PAGE_SIZE for gva in late], dtype="<u8"))
    starts = np.array([area.start for area in areas], dtype="<u8")
    ends = np.array([area.end for area in areas], dtype="<u8")
    after_late = late_pages + np.uint64(PAGE_SIZE)
    runs = _cut(pagemap, np.unique(np.concatenate([starts, ends, late_pages, after_late])))
    owner = np.searchsorted(starts, runs["start"], side="right") - 1
    runs["reason"] = np.array([area.reason for area in areas], dtype="<u1")[owner]
    runs["reason"][np.isin(runs["start"], late_pages)] = Reason.LATE
    runs, owner = _join(runs, owner)
    return _anchor(_spare_the_fragmented(runs, owner))


def _cut(pagemap: NDArray[np.void], borders: NDArray[np.uint64]) -> NDArray[np.void]:
    # Split every entry at the borders that lie inside of it.
    start = pagemap["vaddr"]
    end = start + pagemap["nr_pages"] * np.uint64(PAGE_SIZE)
    first = np.searchsorted(borders, start, side="right")
    parts = np.searchsorted(borders, end, side="left") - first + 1
    entry = np.repeat(np.arange(len(pagemap)), parts)
    nth = np.arange(len(entry)) - np.repeat(np.cumsum(parts) - parts, parts)
    padded = np.append(borders, np.uint64(0))
    cut_start = np.where(nth == 0, start[entry], padded[first[entry] + nth - 1])
    cut_end = np.where(nth == parts[entry] - 1, end[entry], padded[first[entry] + nth])
    runs = np.zeros(len(entry), dtype=PLACED)
    runs["start"] = cut_start
    runs["size"] = cut_end - cut_start
    runs["level"] = pagemap["level"][entry]
    runs["offset"] = pagemap["offset"][entry] + (cut_start - start[entry]).astype("<i8")
    return runs


def _join(
    runs: NDArray[np.void], owner: NDArray[np.intp]
) -> tuple[NDArray[np.void], NDArray[np.intp]]:
    # Neighbours in memory and in the image, in one area, with one verdict, are one run.
    if not len(runs):
        return runs, owner
    end = runs["start"] + runs["size"]
    new = np.ones(len(runs), dtype=bool)
    new[1:] = (
        (runs["start"][1:] != end[:-1])
        | (runs["offset"][1:] != runs["offset"][:-1] + runs["size"][:-1].astype("<i8"))
        | (runs["level"][1:] != runs["level"][:-1])
        | (runs["reason"][1:] != runs["reason"][:-1])
        | (owner[1:] != owner[:-1])
    )
    firsts = np.flatnonzero(new)
    joined = runs[firsts].copy()
    joined["size"] = np.add.reduceat(runs["size"], firsts)
    return joined, owner[firsts]


def _spare_the_fragmented(runs: NDArray[np.void], owner: NDArray[np.intp]) -> NDArray[np.void]:
    outside = np.flatnonzero(runs["reason"] == Reason.OUTSIDE)
    # Rank the outside runs of each area by size, largest first.
    order = outside[np.lexsort((-runs["size"][outside].astype("<i8"), owner[outside]))]
    new_area = np.flatnonzero(np.diff(owner[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(new_area, np.diff(new_area, append=len(order)))
    runs["reason"][order[rank >= _MAX_RUNS_PER_AREA]] = Reason.FRAGMENTED
    return runs


def _anchor(runs: NDArray[np.void]) -> NDArray[np.void]:
    # CRIU 4.1 crashes on a task whose pagemap has no entry (premap_priv_vmas): keep one page.
    if not len(runs) or (runs["reason"] != Reason.OUTSIDE).any():
        return runs
    smallest = int(np.argmin(runs["size"]))
    head = runs[smallest : smallest + 1].copy()
    head["size"] = PAGE_SIZE
    head["reason"] = Reason.ANCHOR
    rest = runs[smallest : smallest + 1].copy()
    rest["start"] += PAGE_SIZE
    rest["size"] -= PAGE_SIZE
    rest["offset"] += PAGE_SIZE
    parts = [runs[:smallest], head, rest[rest["size"] > 0], runs[smallest + 1 :]]
    return np.concatenate(parts)
