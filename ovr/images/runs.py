"""Arithmetic on runs of pages: parts of a pagemap, and pagemaps that build on one another."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ovr.errors import ImagesDamaged
from ovr.images.pagemap import PE_PARENT, Entries
from ovr.memory.addresses import PAGE_SHIFT

__all__ = ["clip", "covered", "ends_of", "page_count", "resolve"]


def ends_of(entries: Entries) -> NDArray[np.uint64]:
    """The first address after each entry."""
    ends: NDArray[np.uint64] = entries["vaddr"] + (entries["nr_pages"] << PAGE_SHIFT)
    return ends


def page_count(entries: Entries) -> int:
    """The number of pages in all entries."""
    return int(entries["nr_pages"].sum())


def clip(entries: Entries, start: NDArray[np.uint64], end: NDArray[np.uint64]) -> Entries:
    """The parts of `entries` that lie in the ranges ``[start[i], end[i])``.

    Both must be ascending and free of overlaps, and the ranges page aligned. An entry that several
    ranges touch comes out in several parts; `offset` and `level` follow.
    """
    first = np.searchsorted(ends_of(entries), start, "right")
    behind = np.searchsorted(entries["vaddr"], end, "left")
    count = np.maximum(behind - first, 0)
    which = np.repeat(np.arange(len(start)), count)
    index = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[which]
    parts: Entries = entries[index]
    low = np.maximum(parts["vaddr"], start[which])
    high = np.minimum(ends_of(parts), end[which])
    skipped = (low - parts["vaddr"]).astype(np.int64)
    parts["offset"] += np.where(parts["offset"] >= 0, skipped, 0)
    parts["vaddr"] = low
    parts["nr_pages"] = (high - low) >> PAGE_SHIFT
    return parts


def covered(
    entries: Entries, start: NDArray[np.uint64], end: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Which entries lie wholly within the ascending ranges, adjacent ranges counting as one."""
    opens = np.append(True, start[1:] != end[:-1])[: len(start)]
    low, high = start[opens], end[np.append(opens[1:], True)[: len(start)]]
    if not len(low):
        return np.zeros(len(entries), bool)
    at = np.searchsorted(low, entries["vaddr"], "right") - 1
    inside: NDArray[np.bool_] = (at >= 0) & (ends_of(entries) <= high[np.maximum(at, 0)])
    return inside


def resolve(levels: Sequence[Entries], name: str) -> Entries:
    """Replace entries that refer to the parent by the ones that hold the data.

    Args:
        levels: the entries of the pagemap of that name in the image set, its parent, and so on.
        name: what messages call it.

    Returns:
        Entries that all have PE_PRESENT, with `level` and `offset` saying where their data lies.

    Raises:
        ImagesDamaged: pages that no level holds.
    """
    own, *parents = levels
    found = [own[own["flags"] & PE_PARENT == 0]]
    wanted = own[own["flags"] & PE_PARENT != 0]
    for level, below in enumerate(parents, 1):
        if not len(wanted):
            break
        parts = clip(below, wanted["vaddr"], ends_of(wanted))
        parts["level"] = level
        if page_count(parts) != page_count(wanted):
            break
        found.append(parts[parts["flags"] & PE_PARENT == 0])
        wanted = parts[parts["flags"] & PE_PARENT != 0]
    if len(wanted):
        raise ImagesDamaged(
            f"{name}: pages at {wanted['vaddr'][0]:#x} or above should be in the parent images,"
            " but are not",
            "put the images of all earlier dumps of the chain where the `parent` links say",
        )
    whole = np.concatenate(found)
    whole = whole[np.argsort(whole["vaddr"])]
    whole.flags.writeable = False
    return whole
