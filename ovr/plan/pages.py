"""Decide which pages of a task go outside, as numpy arrays.

A task's pagemap is cut where the verdict may change (borders of VMAs and of ranges shared
copy-on-write), each part gets a verdict, and neighbours with the same verdict are joined again. A
fragmented process has more than a million entries, so everything is done on arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.extents import Extents, addresses_of, cut_at, ends_of
from ovr.memory.ranges import Ranges, inside, no_ranges, without

__all__ = ["PLACED", "Allocation", "Area", "Cow", "Reason", "place", "placed"]


class Reason(IntEnum):
    """The reason why a run of pages stays inside; `OUTSIDE` and `INHERITED` runs do not."""

    OUTSIDE = 0
    INHERITED = 1
    COW = 2
    VDSO = 3
    SPECIAL = 4
    HUGETLB = 5
    READ_ONLY = 6
    SEALED = 7
    UNREACHABLE = 8
    NOT_ASKED = 9
    ANCHOR = 10

    @property
    def text(self) -> str:
        """The reason as a line of text."""
        return _TEXTS[self]


_TEXTS: Final = {
    Reason.OUTSIDE: "written from outside",
    Reason.INHERITED: "shared copy-on-write with an ancestor, written there",
    Reason.COW: "shared copy-on-write in few pages, or by descendants only",
    Reason.VDSO: "vDSO or vvar: CRIU matches it with the guest kernel's own",
    Reason.SPECIAL: "special area (AIO ring, shadow stack, guard, droppable)",
    Reason.HUGETLB: "read-only hugetlb pages that do not fill their area",
    Reason.READ_ONLY: "not writable, and the guest's kernel permits no forced write",
    Reason.SEALED: "a memfd that is sealed against writing",
    Reason.UNREACHABLE: "shared memory that no task has open or mapped",
    Reason.NOT_ASKED: "memory was not requested (--outside)",
    Reason.ANCHOR: "CRIU cannot restore a task without any page of its own",
}


class Allocation(IntEnum):
    """How the frames of a run that goes outside are allocated in the guest."""

    AGENT = 0
    """By the agent, which touches each page of the stopped skeleton."""
    CRIU = 1
    """By CRIU's restorer (``MADV_POPULATE_WRITE``): faster, for whole pieces of writable areas."""
    BEFORE_FORK = 2
    """By CRIU when it maps a piece of an area (``MAP_POPULATE``), before it forks children."""


PLACED = np.dtype(
    [
        ("gva", "<u8"), ("size", "<u8"), ("offset", "<i8"),
        ("level", "<u4"), ("reason", "<u1"), ("allocation", "<u1"),
    ]
)  # fmt: skip
"""A run of pages: GVA and size in bytes, offset in the pages image of that level (0: the image
set's own, 1: its parent's, …), a `Reason`, and for runs that go outside an `Allocation`."""

# A separate piece of an area costs CRIU an mmap and a madvise; touching a page costs two system
# calls. So pieces pay off only from some size on, and their number in an area is limited.
_SMALLEST_PIECE: Final = 16 * PAGE_SIZE
_MOST_PIECES: Final = 1024


@dataclass(frozen=True)
class Area:
    """A VMA of the images, with the verdict on its pages. Half-open, in bytes.

    Attributes:
        reason: the verdict.
        populates: CRIU can populate it as a whole: it is anonymous and writable.
        divisible: CRIU can populate any part of it too.
        may_be_cut: it may be cut into pieces for CRIU.
        touchable: the agent can allocate its pages; false only for some hugetlb areas.
    """

    start: int
    end: int
    reason: Reason
    populates: bool = False
    divisible: bool = False
    may_be_cut: bool = False
    touchable: bool = True


@dataclass(frozen=True)
class Cow:
    """Pages that a task shares copy-on-write, each a `Ranges`, sorted, without overlaps.

    Attributes:
        inherited: with an ancestor, to whose frames they are written.
        before_fork: with descendants; allocated before the fork.
        inside: with its parent or its children, restored by CRIU from the inside images.
        populated: all ranges that it or an ancestor populates before children are forked; a task
            with pages has at least one outside of these ranges.
    """

    inherited: Ranges = field(default_factory=no_ranges)
    before_fork: Ranges = field(default_factory=no_ranges)
    inside: Ranges = field(default_factory=no_ranges)
    populated: Ranges = field(default_factory=no_ranges)


def place(pagemap: Extents, areas: Sequence[Area], cow: Cow) -> Extents:
    """Return the `PLACED` runs of one task, sorted by address.

    Args:
        pagemap: entries of dtype `images.PAGEMAP_DTYPE`, sorted, all with data in an image.
        areas: the task's private VMAs, sorted; every entry lies in one of them.
        cow: the pages that the task shares with its parent or its children.
    """
    starts = np.array([area.start for area in areas], dtype="<u8")
    ends = np.array([area.end for area in areas], dtype="<u8")
    shared = [cow.inherited, cow.before_fork, cow.inside]
    edges = [ranges[side] for ranges in shared for side in ("start", "end")]
    borders = np.unique(np.concatenate([starts, ends, *edges]))
    runs = cut_at(placed(pagemap), borders)
    owner = np.searchsorted(starts, runs["gva"], side="right") - 1
    runs["reason"] = np.array([area.reason for area in areas], dtype="<u1")[owner]
    runs["reason"][_inside(runs, cow.inside)] = Reason.COW
    runs["reason"][_inside(runs, cow.inherited)] = Reason.INHERITED
    runs["allocation"][_inside(runs, cow.before_fork)] = Allocation.BEFORE_FORK
    runs = _anchor(_join(runs, owner), cow.populated)
    _allocate(runs, np.searchsorted(starts, runs["gva"], side="right") - 1, areas)
    return runs


def placed(pagemap: Extents) -> Extents:
    """Return the extents of a page map as `PLACED`, with no decision yet."""
    found = np.zeros(len(pagemap), dtype=PLACED)
    for name in ("gva", "size", "level", "offset"):
        found[name] = pagemap[name]
    return found


def _inside(runs: Extents, ranges: Ranges) -> NDArray[np.bool_]:
    # Runs do not cross borders of ranges, so the start decides.
    return inside(runs["gva"], ranges["start"], ranges["end"])


def _join(runs: Extents, owner: NDArray[np.intp]) -> Extents:
    # Join neighbours in memory and in the image that have the same area and verdict.
    if not len(runs):
        return runs
    end = ends_of(runs)
    new = np.ones(len(runs), dtype=bool)
    new[1:] = (
        (runs["gva"][1:] != end[:-1])
        | (runs["offset"][1:] != runs["offset"][:-1] + runs["size"][:-1].astype("<i8"))
        | (runs["level"][1:] != runs["level"][:-1])
        | (runs["reason"][1:] != runs["reason"][:-1])
        | (runs["allocation"][1:] != runs["allocation"][:-1])
        | (owner[1:] != owner[:-1])
    )
    firsts = np.flatnonzero(new)
    joined = runs[firsts].copy()
    joined["size"] = np.add.reduceat(runs["size"], firsts)
    return joined


def _allocate(runs: Extents, owner: NDArray[np.intp], areas: Sequence[Area]) -> None:
    # Spans of adjacent pages in memory; in the images their data may lie in several levels.
    outside = np.flatnonzero(
        (runs["reason"] == Reason.OUTSIDE) & (runs["allocation"] != Allocation.BEFORE_FORK)
    )
    if not len(outside):
        return
    start, size, area = runs["gva"][outside], runs["size"][outside], owner[outside]
    opens = np.append(True, (start[1:] != (start + size)[:-1]) | (area[1:] != area[:-1]))
    firsts = np.flatnonzero(opens)
    span_size = np.add.reduceat(size, firsts)
    span_area = area[firsts]
    chosen = np.zeros(len(firsts), dtype=bool)
    chosen[_worth_a_piece(span_size, span_area, areas)] = True
    span = np.cumsum(opens) - 1
    runs["allocation"][outside[chosen[span]]] = Allocation.CRIU
    touchable = np.array([area.touchable for area in areas])[span_area]
    runs["reason"][outside[~(touchable | chosen)[span]]] = Reason.HUGETLB


def _worth_a_piece(
    size: NDArray[np.uint64], owner: NDArray[np.intp], areas: Sequence[Area]
) -> NDArray[np.intp]:
    # The indexes of the spans that CRIU is to populate, the largest of each area first.
    whole = np.array([area.end - area.start for area in areas], dtype="<u8")[owner] == size
    divisible = np.array([area.divisible for area in areas])[owner]
    populates = np.array([area.populates for area in areas])[owner]
    good = np.flatnonzero(populates & (whole | divisible & (size >= _SMALLEST_PIECE)))
    order = good[np.lexsort((-size[good].astype("<i8"), owner[good]))]
    new_area = np.flatnonzero(np.diff(owner[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(new_area, np.diff(new_area, append=len(order)))
    few: NDArray[np.intp] = order[rank < _MOST_PIECES]
    return few


def _anchor(runs: Extents, populated: Ranges) -> Extents:
    # CRIU 4.1 crashes on a task whose pagemap has no entry (premap_priv_vmas), so one page stays
    # inside. Not in a range that is populated before the fork: CRIU compares the page with memory
    # there, and would leave a page of zeros shared that is later written from outside.
    if not len(runs) or (runs["reason"] > Reason.INHERITED).any():
        return runs
    free = without(addresses_of(runs), populated)
    page = free["start"][np.argmin(free["end"] - free["start"])]
    runs = cut_at(runs, np.array([page, page + np.uint64(PAGE_SIZE)]))
    runs["reason"][runs["gva"] == page] = Reason.ANCHOR
    return runs
