"""Extents: arrays of runs of pages with their address, and the algebra on them.

An array of extents has at least the fields ``gva`` (guest virtual address) and ``size``, both in
bytes. ``offset`` (position in a pages image) and ``gpa`` (guest physical address) follow when an
extent is cut:

* `_fastcopy.PIECE` and `_fastcopy.RUN`: to be walked, and as found by a walk;
* `ovr.images.PAGEMAP_DTYPE`: the pages of an image;
* `ovr.plan.pages.PLACED`: the same with the decision about them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovr._fastcopy import PIECE
from ovr.memory.addresses import PAGE_SHIFT, PAGE_SIZE
from ovr.memory.ranges import Ranges, edges_of, inside, join, merged, ranges_of

__all__ = [
    "Extents",
    "addresses_of",
    "as_pieces",
    "cut_at",
    "cut_out",
    "cut_to",
    "ends_of",
    "file_ranges",
    "first_bytes",
    "joined",
    "left_of",
    "on_same_frames",
    "pages_in",
    "sample",
    "split",
    "total",
    "with_flags",
]

Extents = NDArray[np.void]


def total(extents: Extents) -> int:
    """Return the sum of the sizes, in bytes."""
    return int(extents["size"].sum(dtype=np.uint64))


def pages_in(extents: Extents) -> NDArray[np.int64]:
    """Return the number of pages in each extent."""
    return (extents["size"] >> np.uint64(PAGE_SHIFT)).astype(np.int64)


def ends_of(runs: Extents) -> NDArray[np.uint64]:
    """Return the first address after each extent."""
    ends: NDArray[np.uint64] = runs["gva"] + runs["size"]
    return ends


def addresses_of(extents: Extents) -> Ranges:
    """Return the set of addresses in extents."""
    return join(ranges_of(extents["gva"], ends_of(extents)))


def split(ranges: Extents, limit: int) -> Iterator[Extents]:
    """Yield consecutive parts of `ranges`, each of `limit` bytes (the last one maybe fewer).

    A range that crosses a limit is cut in two; every field but ``size`` that says where it is
    (``gva``, ``gpa``, ``offset``) advances with the cut.

    Args:
        ranges: an array of dtype `_fastcopy.PIECE` or `_fastcopy.RUN`, no range empty.
        limit: bytes; a multiple of the page size keeps the parts page-aligned.
    """
    ends = np.cumsum(ranges["size"], dtype=np.uint64)
    whole = int(ends[-1]) if len(ends) else 0
    lows = np.arange(0, whole, limit, dtype=np.uint64)
    highs = np.minimum(lows + np.uint64(limit), np.uint64(whole))
    firsts = np.searchsorted(ends, lows, side="right").tolist()
    lasts = np.searchsorted(ends, highs, side="left").tolist()
    for low, high, first, last in zip(lows.tolist(), highs.tolist(), firsts, lasts, strict=True):
        part = ranges[first : last + 1].copy()
        part["size"][-1] -= int(ends[last]) - high
        _advance(part[:1], low - (int(ends[first]) - int(ranges["size"][first])))
        yield part


def cut_out(runs: Extents, holes: Ranges) -> Extents:
    """Return `runs` without the bytes in `holes`, in order.

    Args:
        runs: the extents.
        holes: of GVAs; sorted, neither touching nor overlapping.
    """
    if not len(runs) or not len(holes):
        return runs
    # Holes are few, and near each other, if there are any: most runs are left as they are.
    start, end = holes["start"][0], holes["end"][-1]
    near = np.flatnonzero((runs["gva"] < end) & (ends_of(runs) > start))
    if not len(near):
        return runs
    first, last = near[0], near[-1] + 1
    parts = cut_at(runs[first:last], edges_of(holes))
    kept = parts[~inside(parts["gva"], holes["start"], holes["end"])]
    return np.concatenate([runs[:first], kept, runs[last:]])


def cut_to(runs: Extents, start: NDArray[np.uint64], end: NDArray[np.uint64]) -> Extents:
    """Return the parts of extents within sorted ranges of GVAs that do not overlap, in order."""
    if not len(runs) or not len(start):
        return runs[:0].copy()
    parts = cut_at(runs, merged(start, end))
    kept: Extents = parts[inside(parts["gva"], start, end)]
    return kept


def cut_at(runs: Extents, edges: NDArray[np.uint64]) -> Extents:
    """Cut extents at addresses, sorted and each once; ``gpa`` and ``offset`` follow."""
    start, end = runs["gva"], ends_of(runs)
    first = np.searchsorted(edges, start, side="right")
    count = np.searchsorted(edges, end, side="left") - first + 1
    which = np.repeat(np.arange(len(runs)), count)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    padded = np.append(edges, np.uint64(0))
    low = np.where(nth == 0, start[which], padded[first[which] + nth - 1])
    high = np.where(nth == count[which] - 1, end[which], padded[first[which] + nth])
    parts: Extents = runs[which]
    for name in {"gpa", "offset"} & {*(runs.dtype.names or ())}:
        parts[name] += (low - start[which]).astype(parts.dtype[name])
    parts["gva"], parts["size"] = low, high - low
    return parts


def as_pieces(runs: Extents) -> Extents:
    """Return runs as pieces to be walked again."""
    pieces = np.empty(len(runs), dtype=PIECE)
    for name in ("gva", "size", "offset"):
        pieces[name] = runs[name]
    return pieces


def joined(extents: Extents) -> Extents:
    """Return the extents with neighbours of the same ``flags`` as one; offsets are the first's."""
    if not len(extents):
        return extents
    apart = extents["gva"][1:] != ends_of(extents)[:-1]
    first = np.append(True, apart | (extents["flags"][1:] != extents["flags"][:-1]))
    whole: Extents = extents[first].copy()
    whole["size"] = np.add.reduceat(extents["size"], np.flatnonzero(first))
    return whole


def with_flags(runs: Extents, wanted: int) -> Extents:
    """Return the runs that have all wanted flags."""
    # Selecting from many runs takes as long as walking them, and nearly always all are selected.
    if int(np.bitwise_and.reduce(runs["flags"])) & wanted == wanted:
        return runs
    chosen: Extents = runs[(runs["flags"] & wanted) == wanted]
    return chosen


def on_same_frames(runs: Extents, others: Extents) -> Extents:
    """Return the parts of `runs` that have the frames that `others` have at the same addresses."""
    starts, ends = others["gva"], ends_of(others)
    parts = cut_at(runs, np.unique(np.concatenate([starts, ends])))
    parts = parts[inside(parts["gva"], starts, ends)]
    at = np.searchsorted(starts, parts["gva"], side="right") - 1
    same: Extents = parts[parts["gpa"] - parts["gva"] == (others["gpa"] - others["gva"])[at]]
    return same


def left_of(part: Extents, done: Extents) -> Extents:
    """Return pieces, or runs, without the addresses of the runs `done`."""
    return cut_out(part, addresses_of(done))


def file_ranges(part: Extents) -> Iterator[tuple[int, int]]:
    """Yield the ranges of the source in bytes, neighbours joined: images are read in order."""
    starts = part["offset"]
    ends = starts + part["size"].astype("<i8")
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    firsts = np.concatenate([[0], breaks])
    lasts = np.concatenate([breaks - 1, [len(part) - 1]])
    yield from zip(starts[firsts].tolist(), ends[lasts].tolist(), strict=True)


def first_bytes(runs: Extents, cut: Extents, size: int) -> Extents:
    """Return the pages of `runs` that lie before the end of the first `size` bytes of `cut`.

    Both are sorted by GVA, and `cut` has a part of the bytes of `runs`.
    """
    ends = np.cumsum(cut["size"])
    at = int(np.searchsorted(ends, np.uint64(size), side="right"))
    if at == len(cut):
        return runs
    inside = np.uint64(size) - (ends[at] - cut["size"][at])
    stop = (cut["gva"][at] + inside) // np.uint64(PAGE_SIZE) * np.uint64(PAGE_SIZE)
    return cut_to(runs, np.zeros(1, dtype="<u8"), np.array([stop], dtype="<u8"))


def sample(pieces: Extents, pages_at_most: int) -> Extents:
    """Return pages spread evenly over all of them, the first and the last among them."""
    pages = total(pieces) >> 12
    if pages <= pages_at_most:
        return pieces
    chosen = np.unique(np.linspace(0, pages - 1, pages_at_most).astype("<u8"))
    ends = np.cumsum(pieces["size"] >> np.uint64(12))
    owner = np.searchsorted(ends, chosen, side="right")
    within = (chosen - (ends[owner] - (pieces["size"][owner] >> np.uint64(12)))) << np.uint64(12)
    chosen_pages = np.empty(len(chosen), dtype=PIECE)
    chosen_pages["gva"] = pieces["gva"][owner] + within
    chosen_pages["size"] = 4096
    chosen_pages["offset"] = pieces["offset"][owner] + within.astype("<i8")
    return chosen_pages


def _advance(one: NDArray[Any], by: int) -> None:
    for name in one.dtype.names or ():
        if name in ("gva", "gpa", "offset"):
            one[name] += by
    one["size"] -= by
