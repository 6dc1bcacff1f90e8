"""Arrays of runs and pieces: what a walk has found, what is left, what is chosen of them.

All functions take arrays of `_fastcopy.RUN` or `_fastcopy.PIECE`; addresses and sizes are in bytes.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ovr._fastcopy import PIECE
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.ram import Runs
from ovr.memory.ranges import cut_at, cut_out, cut_to, inside, join, ranges_of, total

__all__ = [
    "as_pieces",
    "ends_of",
    "file_ranges",
    "first_bytes",
    "left_of",
    "on_same_frames",
    "sample",
    "with_flags",
]


def as_pieces(runs: Runs) -> Runs:
    """Return runs as what would be walked to find them again."""
    pieces = np.empty(len(runs), dtype=PIECE)
    for name in ("gva", "size", "offset"):
        pieces[name] = runs[name]
    return pieces


def with_flags(runs: Runs, wanted: int) -> Runs:
    """Return the runs that have all the flags that are wanted."""
    # To choose some of many takes as long as to walk them, and nearly always it is all.
    if int(np.bitwise_and.reduce(runs["flags"])) & wanted == wanted:
        return runs
    chosen: Runs = runs[(runs["flags"] & wanted) == wanted]
    return chosen


def ends_of(runs: Runs) -> NDArray[np.uint64]:
    """Return the address behind each run."""
    ends: NDArray[np.uint64] = runs["gva"] + runs["size"]
    return ends


def on_same_frames(runs: Runs, others: Runs) -> Runs:
    """Return the parts of `runs` that have the frames that `others` have at the same addresses."""
    starts, ends = others["gva"], ends_of(others)
    parts = cut_at(runs, np.unique(np.concatenate([starts, ends])))
    parts = parts[inside(parts["gva"], starts, ends)]
    at = np.searchsorted(starts, parts["gva"], side="right") - 1
    same: Runs = parts[parts["gpa"] - parts["gva"] == (others["gpa"] - others["gva"])[at]]
    return same


def left_of(part: Runs, done: Runs) -> Runs:
    """Return what is left of pieces, or runs, without the addresses of the runs `done`."""
    return cut_out(part, join(ranges_of(done["gva"], ends_of(done))))


def file_ranges(part: Runs) -> Iterator[tuple[int, int]]:
    """Yield the ranges of the source, in bytes; neighbours are one: images are read in order."""
    starts = part["offset"]
    ends = starts + part["size"].astype("<i8")
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    firsts = np.concatenate([[0], breaks])
    lasts = np.concatenate([breaks - 1, [len(part) - 1]])
    yield from zip(starts[firsts].tolist(), ends[lasts].tolist(), strict=True)


def first_bytes(runs: Runs, cut: Runs, size: int) -> Runs:
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


def sample(pieces: Runs, pages_at_most: int) -> Runs:
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
