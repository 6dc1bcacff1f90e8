"""Arrays of ranges: dividing them into parts of a bounded number of bytes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["split", "total"]


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


def _advance(one: NDArray[Any], by: int) -> None:
    for name in one.dtype.names or ():
        if name in ("gva", "gpa", "offset"):
            one[name] += by
    one["size"] -= by
