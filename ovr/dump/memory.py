"""Which pages a dump reads from the VM's RAM, and where they go in the pages images.

The guest's CRIU has dumped the tree with a parent image set of ours. Its pagemaps list every page
of each task: as the parent's, which it has not read, or as present, which it has written itself
because it was written to since it was tracked, or because it always does. All of them are read from
RAM: what a stopped tree has there is final, and CRIU's own copies are thrown away with it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ovr._fastcopy import PIECE
from ovr.attempt.sink import Sink
from ovr.dump.output import NewImages
from ovr.errors import ImagesDamaged
from ovr.images.pagemap import (
    MAX_PAGEMAP,
    PE_PARENT,
    PE_PRESENT,
    Pagemap,
    decode_pagemap,
    encode_pagemap,
    offsets_of,
)
from ovr.memory.extents import Extents, cut_at, joined, total
from ovr.memory.ranges import Ranges, edges_of, inside

__all__ = ["Dumped", "Placed", "dumped_pages", "place"]

_TASK: Final = re.compile(r"pagemap-(\d+)\.img")
_SHARED: Final = re.compile(r"pagemap-shmem-(\d+)\.img")


@dataclass(frozen=True)
class Dumped:
    """The pages that CRIU has found in a task, or in a shared object.

    Attributes:
        name: name of the pagemap image.
        number: the task's pid in the pid namespace of the tree, or the object's `shmid`.
        pagemap: as CRIU has written it.
        shared: whether it is a shared object; addresses are offsets in it then.
    """

    name: str
    number: int
    pagemap: Pagemap
    shared: bool

    @property
    def pages_name(self) -> str:
        """Name of the pages image."""
        return f"pages-{self.pagemap.pages_id}.img"

    @property
    def clean(self) -> Extents:
        """The pages that were not written to since they were tracked."""
        entries = self.pagemap.entries
        clean: Extents = entries[entries["flags"] & PE_PARENT != 0]
        return clean


@dataclass(frozen=True)
class Placed:
    """The pages of a task or object that have to be read while the tree is stopped.

    Attributes:
        dumped: all of its pages.
        sink: its pages image.
        pieces: the pages, a `_fastcopy.PIECE` array; offsets are positions in `sink`.
    """

    dumped: Dumped
    sink: Sink
    pieces: Extents


def dumped_pages(names: Sequence[str], images: NewImages) -> list[Dumped]:
    """Return the pages that CRIU has found, in the order of its images.

    Raises:
        ImagesDamaged, ImagesUnsupported: the pagemaps are invalid.
    """
    found = []
    owner: dict[int, str] = {}
    for name in sorted(names):
        task, shared = _TASK.fullmatch(name), _SHARED.fullmatch(name)
        if not (match := task or shared):
            continue
        pagemap = decode_pagemap(images.read(name, MAX_PAGEMAP), name)
        if owner.setdefault(pagemap.pages_id, name) != name:
            raise ImagesDamaged(f"{name} has the same pages image as {owner[pagemap.pages_id]}")
        found.append(Dumped(name, int(match[1]), pagemap, shared is not None))
    return found


def place(
    dumped: Dumped,
    images: NewImages,
    make_sink: Callable[[Dumped, int], Sink],
    copied: Ranges,
) -> Placed:
    """Write the final pagemap, and make room for the pages that it has.

    Args:
        dumped: the pages that CRIU has found.
        images: gets the pagemap.
        make_sink: returns the pages image, given its size in bytes.
        copied: addresses of pages that the parent of these images has, as they are now.

    Raises:
        UsageError: the files cannot be written.
    """
    entries = dumped.pagemap.entries.copy()
    entries["flags"] = PE_PRESENT
    if len(copied):
        entries = cut_at(entries, edges_of(copied))
        entries["flags"][inside(entries["gva"], copied["start"], copied["end"])] = PE_PARENT
    entries = joined(entries)
    entries["offset"] = offsets_of(entries)
    present = entries[entries["flags"] == PE_PRESENT]
    final = Pagemap(dumped.pagemap.pages_id, entries, dumped.pagemap.compat)
    images.write(dumped.name, encode_pagemap(final, dumped.name))
    sink = make_sink(dumped, total(present))
    pieces = np.empty(len(present), dtype=PIECE)
    for field in ("gva", "size", "offset"):
        pieces[field] = present[field]
    return Placed(dumped, sink, pieces)
