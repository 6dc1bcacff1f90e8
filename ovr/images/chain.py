"""Resolve chains of incremental pagemaps."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ovr.errors import ImagesDamaged
from ovr.images.pagemap import PE_PARENT
from ovr.memory.extents import Extents, cut_to, ends_of, total

__all__ = ["covered", "resolve"]


def covered(
    entries: Extents, start: NDArray[np.uint64], end: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Return which entries lie within the ascending ranges; adjacent ranges count as one."""
    opens = np.append(True, start[1:] != end[:-1])[: len(start)]
    low, high = start[opens], end[np.append(opens[1:], True)[: len(start)]]
    if not len(low):
        return np.zeros(len(entries), bool)
    at = np.searchsorted(low, entries["gva"], "right") - 1
    inside: NDArray[np.bool_] = (at >= 0) & (ends_of(entries) <= high[np.maximum(at, 0)])
    return inside


def resolve(levels: Sequence[Extents], name: str) -> Extents:
    """Replace entries that refer to the parent by those that have the data.

    Args:
        levels: the entries of the pagemap of that name in the image set, its parent, and so on.
        name: its name in messages.

    Returns:
        Extents that all have PE_PRESENT; `level` and `offset` locate their data.

    Raises:
        ImagesDamaged: pages that no level holds.
    """
    own, *parents = levels
    found = [own[own["flags"] & PE_PARENT == 0]]
    wanted = own[own["flags"] & PE_PARENT != 0]
    for level, below in enumerate(parents, 1):
        if not len(wanted):
            break
        parts = cut_to(below, wanted["gva"], ends_of(wanted))
        parts["level"] = level
        if total(parts) != total(wanted):
            break
        found.append(parts[parts["flags"] & PE_PARENT == 0])
        wanted = parts[parts["flags"] & PE_PARENT != 0]
    if len(wanted):
        raise ImagesDamaged(
            f"{name}: pages at {wanted['gva'][0]:#x} or above should be in the parent images,"
            " but are not",
            "put the images of all earlier dumps of the chain where the `parent` links point",
        )
    whole = np.concatenate(found)
    whole = whole[np.argsort(whole["gva"])]
    whole.flags.writeable = False
    return whole
