"""Pages that come straight from the RAM of another VM, frame to frame."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from ovr._fastcopy import OWNED, PIECE, RUN
from ovr.errors import AttemptFailed
from ovr.memory.addresses import PAGE_SIZE, Gva
from ovr.memory.extents import (
    Extents,
    as_pieces,
    cut_at,
    ends_of,
    left_of,
    split,
    total,
    with_flags,
)
from ovr.memory.paging import AddressSpace, Frames
from ovr.memory.ram import GuestRam

__all__ = ["EVERYWHERE", "Lane", "Origin"]

_TRIES: Final = 20
_INDEX_SHIFT: Final = 40
"""Bits of an offset within a piece; above them is the number of the piece."""
_DELTA_MASK: Final = (1 << _INDEX_SHIFT) - 1
EVERYWHERE: Final = np.array([(0, 1 << 63, 0)], PIECE)
"""Places for positions that are addresses in the other VM."""


@dataclass(frozen=True, eq=False)
class Origin:
    """The memory of a process, or of a shared object, in another VM: a source of copies.

    Attributes:
        name: its name in messages.
        space: its address space there.
        places: where positions are there, a `_fastcopy.PIECE` array sorted by ``offset``, which is
            a position. Pages that are neighbours in the destination, and by position, are
            neighbours there, too.
        check: as for `ovr.attempt.targets.Target`, there.
        ask: has that guest read pages into its memory, given as pieces.
        frames: for a running process: identifies its own pages; others are left out. None: it is
            stopped, and all of its pages are copied.
    """

    name: str
    space: AddressSpace
    places: Extents
    check: Callable[[], None]
    ask: Callable[[Extents], None]
    frames: Frames | None = None

    nowait: ClassVar = True
    """Pages are copied in holds without waiting."""

    def addresses(self, positions: Extents) -> Extents:
        """Return the addresses of positions as pieces, in the same order.

        Args:
            positions: pieces or runs; ``offset`` is the position.
        """
        at = np.searchsorted(self.places["offset"], positions["offset"], side="right") - 1
        pieces = as_pieces(positions)
        apart = (positions["offset"] - self.places["offset"][at]).astype("<u8")
        pieces["gva"] = self.places["gva"][at] + apart
        return pieces


class Lane:
    """Some pages of an origin, ready to be copied to, or compared with, frames of a guest.

    Attributes:
        origin: has the pages.
        part: the pages, a `_fastcopy.PIECE` array; offsets are positions in the origin.
        copied: after `copy`, the runs of the origin's address space that were copied.
    """

    def __init__(self, origin: Origin, part: Extents) -> None:
        self.part = part
        self.copied: Extents = np.empty(0, RUN)
        self.origin = origin

    @classmethod
    def make(cls, origin: Origin, part: Extents, *, aside: bool) -> Self:
        """Map the host pages of the origin, with its VM running.

        Args:
            origin: has the pages.
            part: pieces; offsets are positions in it.
            aside: they were not in memory in the last hold: have them read.

        Raises:
            AttemptFailed: they stay away.
            GuestFault: page tables there are damaged.
        """
        pieces = origin.addresses(part)
        found = origin.space.walk(pieces)
        if aside and origin.frames is None:
            found = _read_in(origin, pieces, found)
        origin.space.ram.prefault(found)
        return cls(origin, part)

    def copy(self, ram: GuestRam, runs: Extents) -> int:
        """Copy pages to the frames in `runs`; the caller states why they stay there.

        Returns the number of bytes done, in the order of the runs: fewer than all if the hold is to
        end, or a page of a stopped process is not in memory.

        Raises:
            GuestFault: page tables there are damaged.
            HoldBroken: the VM is not held any more.
        """
        self.origin.check()
        there, crossing = self._look_up(runs)
        done = ram.copy_across(crossing, self.origin.space.ram)
        if done == total(there):
            self.copied = there
            return self._until(runs, there)
        self.copied = next(split(there, done), there[:0]) if done else there[:0]
        return int(self.copied["offset"][-1]) + int(self.copied["size"][-1]) if done else 0

    def compare(self, ram: GuestRam, runs: Extents) -> tuple[int, Gva | None]:
        """Compare pages with the frames in `runs`.

        Returns the number of bytes that are equal, counted as `copy` does, and the address of the
        first page that differs, or None.

        Raises:
            GuestFault: page tables there are damaged.
        """
        self.origin.check()
        there, crossing = self._look_up(runs)
        gva = ram.first_difference_across(crossing, self.origin.space.ram)
        return self._until(runs, there), gva

    def _look_up(self, runs: Extents) -> tuple[Extents, Extents]:
        # The runs there, with the bytes of `runs` before each as the offset; and those here with
        # the GPA there as the offset.
        origin = self.origin
        parts = _page_by_page_at_the_edges(runs)
        pieces, heads = _whole_pages(origin.addresses(parts))
        there = origin.space.walk(pieces, origin.frames)
        if origin.frames is not None:
            there = with_flags(there, OWNED)
        at, within = there["offset"] >> _INDEX_SHIFT, there["offset"] & _DELTA_MASK
        there["gva"] += heads[at]
        there["gpa"] += heads[at]
        there["size"] = np.minimum(there["size"], parts["size"][at])
        there["offset"] = (np.cumsum(parts["size"]) - parts["size"])[at].astype("<i8") + within
        crossing = there.copy()
        crossing["gva"] = parts["gva"][at] + within.astype("<u8")
        crossing["gpa"] = parts["gpa"][at] + within.astype("<u8")
        crossing["offset"] = there["gpa"]
        if origin.frames is not None:
            return there, crossing
        gaps = there["offset"] != (np.cumsum(there["size"]) - there["size"]).astype("<i8")
        whole = int(gaps.argmax()) if gaps.any() else len(there)
        return there[:whole], crossing[:whole]

    def _until(self, runs: Extents, there: Extents) -> int:
        return total(runs) if self.origin.frames is not None else total(there)


def _page_by_page_at_the_edges(runs: Extents) -> Extents:
    # Bytes of a page that are spared leave runs that begin or end within a page.
    page = np.uint64(PAGE_SIZE)
    ends = ends_of(runs)
    edges = [(runs["gva"] + page - np.uint64(1)) // page * page, ends // page * page]
    ragged = [runs["gva"] % page != 0, ends % page != 0]
    inner = np.concatenate([edge[odd] for edge, odd in zip(edges, ragged, strict=True)])
    return cut_at(runs, np.unique(inner)) if len(inner) else runs


def _whole_pages(pieces: Extents) -> tuple[Extents, NDArray[np.uint64]]:
    # The pages of pieces, numbered in their offsets, and the bytes before each piece in its page.
    page = np.uint64(PAGE_SIZE)
    heads = pieces["gva"] % page
    whole = pieces.copy()
    whole["gva"] -= heads
    whole["size"] = np.where(pieces["size"] < page, page, pieces["size"])
    whole["offset"] = np.arange(len(pieces), dtype="<i8") << _INDEX_SHIFT
    return whole, heads


def _read_in(origin: Origin, pieces: Extents, found: Extents) -> Extents:
    for _ in range(_TRIES):
        absent = left_of(pieces, found)
        if not len(absent):
            return found
        origin.ask(absent)
        found = origin.space.walk(pieces)
    raise AttemptFailed(
        f"{origin.name}: {total(absent)} bytes at {int(absent['gva'][0]):#x} and above were never"
        f" in memory when looked at ({_TRIES} tries)",
        "the guest that it comes from may be out of memory; free some and try again",
    )
