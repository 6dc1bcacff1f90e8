"""Sets of addresses, as arrays of ranges."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "RANGE",
    "Ranges",
    "common",
    "edges_of",
    "inside",
    "join",
    "merged",
    "no_ranges",
    "ranges_of",
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
    flat = [edges_of(join(one)), edges_of(join(other))]
    edges = merged(*flat)
    # Behind an odd number of a set's edges one is inside of it.
    inside = [f.searchsorted(edges, side="right") % 2 == 1 for f in flat]
    kept = both(*inside).nonzero()[0]
    return join(ranges_of(edges[kept], edges[np.minimum(kept + 1, len(edges) - 1)]))


def merged(*edges: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return each of the sorted edges once, sorted."""
    # A stable sort merges sorted arrays, several times faster than np.unique, which hashes.
    every = np.concatenate(edges)
    every.sort(kind="stable")
    new = np.ones(len(every), dtype=np.bool_)
    new[1:] = every[1:] != every[:-1]
    return every[new]


def edges_of(ranges: Ranges) -> NDArray[np.uint64]:
    """Return starts and ends, interleaved."""
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
