"""Arrays of ranges: dividing them into parts of a bounded number of bytes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["cut_out", "split", "total"]


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
    for low in range(0, total(ranges), limit):
        high = min(low + limit, int(ends[-1]))
        first = int(np.searchsorted(ends, low, side="right"))
        last = int(np.searchsorted(ends, high, side="left"))
        part = ranges[first : last + 1].copy()
        part["size"][-1] -= int(ends[last]) - high
        _advance(part[:1], low - (int(ends[first]) - int(ranges["size"][first])))
        yield part


def cut_out(runs: NDArray[np.void], holes: NDArray[np.void]) -> NDArray[np.void]:
    """Return `runs` without the bytes in `holes`, in order.

    Args:
        runs: an array of dtype `_fastcopy.RUN`.
        holes: sorted ``start``, ``end`` ranges of GVAs that neither touch nor overlap.
    """
    if not len(runs) or not len(holes):
        return runs
    edges = np.stack([holes["start"], holes["end"]], axis=1).reshape(-1)
    start, end = runs["gva"], runs["gva"] + runs["size"]
    first = np.searchsorted(edges, start, side="right")
    count = np.searchsorted(edges, end, side="left") - first + 1
    which = np.repeat(np.arange(len(runs)), count)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    padded = np.append(edges, np.uint64(0))
    low = np.where(nth == 0, start[which], padded[first[which] + nth - 1])
    high = np.where(nth == count[which] - 1, end[which], padded[first[which] + nth])
    parts = runs[which]
    for name in ("gpa", "offset"):
        parts[name] += (low - start[which]).astype(parts.dtype[name])
    parts["gva"], parts["size"] = low, high - low
    # Between an odd and an even number of edges is a hole.
    kept: NDArray[np.void] = parts[np.searchsorted(edges, low, side="right") % 2 == 0]
    return kept


def _advance(one: NDArray[Any], by: int) -> None:
    for name in one.dtype.names or ():
        if name in ("gva", "gpa", "offset"):
            one[name] += by
    one["size"] -= by
