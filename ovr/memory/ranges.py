"""Arrays of ranges: sets of addresses, and dividing runs into parts of a bounded size."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "RANGE",
    "Ranges",
    "common",
    "cut_at",
    "cut_out",
    "cut_to",
    "inside",
    "join",
    "no_ranges",
    "ranges_of",
    "split",
    "total",
    "without",
]

RANGE: Final = np.dtype([("start", "<u8"), ("end", "<u8")])
"""Half-open, in bytes."""

Ranges = NDArray[np.void]
"""An array of `RANGE`: a set of addresses. What the functions here return is sorted, and its
elements neither touch nor overlap; what they take may be anything."""


def ranges_of(start: NDArray[np.uint64], end: NDArray[np.uint64]) -> Ranges:
    """Return the `RANGE` array with these columns, as they are."""
    ranges = np.empty(len(start), dtype=RANGE)
    ranges["start"], ranges["end"] = start, end
    return ranges


def no_ranges() -> Ranges:
    """Return the empty set."""
    return np.empty(0, dtype=RANGE)


def join(*sets: Ranges) -> Ranges:
    """Return what is in any of the sets; one of them itself, if that is it."""
    filled = [one for one in sets if len(one)]
    if not filled:
        return no_ranges()
    ranges = filled[0] if len(filled) == 1 else np.concatenate(filled)
    if (ranges["start"][1:] > ranges["end"][:-1]).all():
        return ranges
    # Nearly always in order already; to sort structures by a field is slow.
    order = np.argsort(ranges["start"], kind="stable")
    ordered = ranges[order]
    reach = np.maximum.accumulate(ordered["end"])
    opens = np.ones(len(ordered), dtype=np.bool_)
    opens[1:] = ordered["start"][1:] > reach[:-1]
    first = opens.nonzero()[0]
    last = np.empty_like(first)
    last[:-1], last[-1] = first[1:] - 1, len(ordered) - 1
    return ranges_of(ordered["start"][first], reach[last])


def common(one: Ranges, other: Ranges) -> Ranges:
    """Return what is in both sets."""
    return _combined(one, other, np.logical_and) if len(one) and len(other) else no_ranges()


def without(one: Ranges, other: Ranges) -> Ranges:
    """Return what is in `one` and not in `other`."""
    return _combined(one, other, np.greater) if len(one) and len(other) else join(one)


def _combined(one: Ranges, other: Ranges, both: Callable[..., Any]) -> Ranges:
    flat = [_edges(join(one)), _edges(join(other))]
    edges = _merged(*flat)
    # Behind an odd number of a set's edges one is inside of it.
    inside = [f.searchsorted(edges, side="right") % 2 == 1 for f in flat]
    kept = both(*inside).nonzero()[0]
    return join(ranges_of(edges[kept], edges[np.minimum(kept + 1, len(edges) - 1)]))


def total(ranges: NDArray[np.void]) -> int:
    """Return the sum of the sizes, in bytes."""
    return int(ranges["size"].sum(dtype=np.uint64))


def split(ranges: NDArray[np.void], limit: int) -> Iterator[NDArray[np.void]]:
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


def cut_out(runs: NDArray[np.void], holes: Ranges) -> NDArray[np.void]:
    """Return `runs` without the bytes in `holes`, in order.

    Args:
        runs: an array of dtype `_fastcopy.RUN` or `_fastcopy.PIECE`.
        holes: of GVAs; sorted, neither touching nor overlapping.
    """
    if not len(runs) or not len(holes):
        return runs
    # Holes are few, and near each other, if there are any: most runs are left as they are.
    start, end = holes["start"][0], holes["end"][-1]
    near = np.flatnonzero((runs["gva"] < end) & (runs["gva"] + runs["size"] > start))
    if not len(near):
        return runs
    first, last = near[0], near[-1] + 1
    parts = cut_at(runs[first:last], _edges(holes))
    kept = parts[~inside(parts["gva"], holes["start"], holes["end"])]
    return np.concatenate([runs[:first], kept, runs[last:]])


def cut_to(
    runs: NDArray[np.void], start: NDArray[np.uint64], end: NDArray[np.uint64]
) -> NDArray[np.void]:
    """Return of `runs` what lies in the sorted ranges of GVAs, which do not overlap, in order."""
    if not len(runs) or not len(start):
        return runs[:0]
    parts = cut_at(runs, _merged(start, end))
    kept: NDArray[np.void] = parts[inside(parts["gva"], start, end)]
    return kept


def cut_at(
    runs: NDArray[np.void], edges: NDArray[np.uint64], address: str = "gva"
) -> NDArray[np.void]:
    """Cut `runs` at addresses, sorted and each once; fields that say where it is follow.

    Args:
        runs: an array with the fields `address` and ``size``, in bytes.
        edges: where to cut.
        address: the field with the GVA.
    """
    start, end = runs[address], runs[address] + runs["size"]
    first = np.searchsorted(edges, start, side="right")
    count = np.searchsorted(edges, end, side="left") - first + 1
    which = np.repeat(np.arange(len(runs)), count)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    padded = np.append(edges, np.uint64(0))
    low = np.where(nth == 0, start[which], padded[first[which] + nth - 1])
    high = np.where(nth == count[which] - 1, end[which], padded[first[which] + nth])
    parts: NDArray[np.void] = runs[which]
    for name in {"gpa", "offset"} & {*(runs.dtype.names or ())}:
        parts[name] += (low - start[which]).astype(parts.dtype[name])
    parts[address], parts["size"] = low, high - low
    return parts


def _merged(*edges: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # Each of the sorted edges once. A stable sort merges what is in order already, several times
    # faster than np.unique, which hashes.
    every = np.concatenate(edges)
    every.sort(kind="stable")
    new = np.ones(len(every), dtype=np.bool_)
    new[1:] = every[1:] != every[:-1]
    return every[new]


def _edges(ranges: Ranges) -> NDArray[np.uint64]:
    edges = np.empty(2 * len(ranges), dtype=np.uint64)
    edges[::2], edges[1::2] = ranges["start"], ranges["end"]
    return edges


def inside(
    points: NDArray[np.uint64], start: NDArray[np.uint64], end: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Tell which points lie in one of the sorted ranges, which do not overlap."""
    at = np.searchsorted(start, points, side="right") - 1
    # At -1, where no range begins before the point, the last element is looked at.
    found: NDArray[np.bool_] = np.append(end, np.uint64(0))[at] > points
    return found


def _advance(one: NDArray[Any], by: int) -> None:
    for name in one.dtype.names or ():
        if name in ("gva", "gpa", "offset"):
            one[name] += by
    one["size"] -= by
