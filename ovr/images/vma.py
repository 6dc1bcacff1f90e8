"""Handle the memory areas of CRIU's mm images in bulk (``criu/include/image.h``, ``vma.h``)."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ovr.errors import ImagesDamaged
from ovr.images.framing import DUMP_AGAIN
from ovr.images.messages import VmaEntry
from ovr.images.pagemap import USER_END
from ovr.images.wire import copy_of
from ovr.memory.addresses import PAGE_SIZE

__all__ = [
    "MADV_DOFORK",
    "MADV_DONTDUMP",
    "MADV_DONTFORK",
    "MADV_DONTNEED_LOCKED",
    "MADV_HUGEPAGE",
    "MADV_MERGEABLE",
    "MADV_NOHUGEPAGE",
    "MADV_POPULATE_WRITE",
    "MADV_WIPEONFORK",
    "MAP_ANONYMOUS",
    "MAP_FIXED",
    "MAP_GROWSDOWN",
    "MAP_HUGETLB",
    "MAP_POPULATE",
    "MAP_PRIVATE",
    "MAP_STACK",
    "PROT_EXEC",
    "PROT_READ",
    "PROT_WRITE",
    "VMA_ANON_PRIVATE",
    "VMA_ANON_SHARED",
    "VMA_AREA_AIORING",
    "VMA_AREA_GUARD",
    "VMA_AREA_HEAP",
    "VMA_AREA_MEMFD",
    "VMA_AREA_REGULAR",
    "VMA_AREA_SHSTK",
    "VMA_AREA_SOCKET",
    "VMA_AREA_STACK",
    "VMA_AREA_SYSVIPC",
    "VMA_AREA_UPROBES",
    "VMA_AREA_VDSO",
    "VMA_AREA_VSYSCALL",
    "VMA_AREA_VVAR",
    "VMA_DTYPE",
    "VMA_FILE_PRIVATE",
    "VMA_FILE_SHARED",
    "VMA_UNSUPP",
    "Vmas",
    "is_private",
    "split_vma",
    "vma_array",
    "without_content",
]

TASK_SIZE: Final = (1 << 47) - PAGE_SIZE
"""CRIU's limit on x86, also with 5 levels of page tables (compel_task_size()): mm.img has the areas
above it, but their pages are not dumped (vma_entry_is_private())."""
VMA_AREA_REGULAR: Final = 1 << 0
VMA_AREA_STACK: Final = 1 << 1
VMA_AREA_VSYSCALL: Final = 1 << 2
VMA_AREA_VDSO: Final = 1 << 3
VMA_AREA_HEAP: Final = 1 << 5
VMA_FILE_PRIVATE: Final = 1 << 6
VMA_FILE_SHARED: Final = 1 << 7
VMA_ANON_SHARED: Final = 1 << 8
VMA_ANON_PRIVATE: Final = 1 << 9
VMA_AREA_SYSVIPC: Final = 1 << 10
VMA_AREA_SOCKET: Final = 1 << 11
VMA_AREA_VVAR: Final = 1 << 12
VMA_AREA_AIORING: Final = 1 << 13
VMA_AREA_MEMFD: Final = 1 << 14
VMA_AREA_SHSTK: Final = 1 << 15
VMA_AREA_GUARD: Final = 1 << 16
VMA_AREA_UPROBES: Final = 1 << 17
VMA_UNSUPP: Final = 1 << 31

# mman-common.h; bit N of VmaEntry.madv asks for madvise(N).
PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_GROWSDOWN: Final = 0x100
MAP_POPULATE: Final = 0x8000
MAP_STACK: Final = 0x20000
MAP_HUGETLB: Final = 0x40000
MADV_DONTFORK: Final = 10
MADV_DOFORK: Final = 11
MADV_MERGEABLE: Final = 12
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_DONTDUMP: Final = 16
MADV_WIPEONFORK: Final = 18
MADV_POPULATE_WRITE: Final = 23
MADV_DONTNEED_LOCKED: Final = 24  # since v5.18

VMA_DTYPE: Final = np.dtype(
    [
        ("start", "<u8"),
        ("end", "<u8"),
        ("pgoff", "<u8"),
        ("shmid", "<u8"),
        ("prot", "<u4"),
        ("flags", "<u4"),
        ("status", "<u4"),
        ("fd", "<i8"),
        ("madv", "<u8"),
    ]
)
"""One memory area; fields as in `VmaEntry`, `madv` 0 if absent."""

Vmas = NDArray[np.void]
"""An array of `VMA_DTYPE`."""


def vma_array(entries: Iterable[VmaEntry], name: str) -> Vmas:
    """Return the areas of the mm image `name`, checked: row i is ``mm.vmas[i]``.

    Raises:
        ImagesDamaged: an area is empty, unaligned or outside user addresses, areas overlap or are
            out of order, or guard areas are not at the end.
    """
    rows = [
        (v.start, v.end, v.pgoff, v.shmid, v.prot, v.flags, v.status, v.fd, v.madv) for v in entries
    ]
    vmas = np.array(rows, VMA_DTYPE)
    _check(vmas, name)
    vmas.flags.writeable = False
    return vmas


def _check(vmas: Vmas, name: str) -> None:
    if not len(vmas):
        raise ImagesDamaged(f"{name}: no memory areas", DUMP_AGAIN)
    start, end, status = vmas["start"], vmas["end"], vmas["status"]
    guard = status & VMA_AREA_GUARD != 0
    outside = (end > USER_END) & (status & VMA_AREA_VSYSCALL == 0)
    wrong = (start >= end) | (start % PAGE_SIZE != 0) | (end % PAGE_SIZE != 0) | outside
    wrong[1:] |= guard[:-1] & ~guard[1:]
    wrong[1:] |= (start[1:] < end[:-1]) & (guard[1:] == guard[:-1])
    if wrong.any():
        first = vmas[wrong.argmax()]
        raise ImagesDamaged(
            f"{name}: impossible memory area {first['start']:#x}-{first['end']:#x}", DUMP_AGAIN
        )


def is_private(vmas: Vmas) -> NDArray[np.bool_]:
    """Return which areas have their pages in the task's pagemap (vma_entry_is_private of CRIU)."""
    status = vmas["status"]
    regular = status & VMA_AREA_REGULAR != 0
    private = status & (VMA_ANON_PRIVATE | VMA_FILE_PRIVATE) != 0
    special = status & (VMA_AREA_AIORING | VMA_AREA_SHSTK) != 0
    chosen: NDArray[np.bool_] = (regular & private) | special
    chosen &= status & VMA_AREA_GUARD == 0
    return chosen


def without_content(vmas: Vmas) -> Vmas:
    """Return the private areas whose pages CRIU does not dump: those above `TASK_SIZE`."""
    chosen: Vmas = vmas[is_private(vmas) & (vmas["end"] > TASK_SIZE)]
    return chosen


def split_vma(vma: VmaEntry, cuts: Sequence[int]) -> list[VmaEntry]:
    """Cut an area into adjacent ones, which the kernel merges again if their flags are equal.

    Args:
        vma: the area; not modified.
        cuts: ascending page-aligned addresses strictly inside of it.

    Raises:
        ValueError: a cut is not such an address, or the area must stay whole (it grows down, or was
            made by the kernel).
    """
    edges = [vma.start, *cuts, vma.end]
    if any(low >= high or high % PAGE_SIZE for low, high in pairwise(edges)):
        raise ValueError(f"cannot cut {vma.start:#x}-{vma.end:#x} at {[hex(c) for c in cuts]}")
    whole = VMA_AREA_VDSO | VMA_AREA_VVAR | VMA_AREA_AIORING | VMA_AREA_SHSTK | VMA_AREA_GUARD
    if cuts and (vma.flags & MAP_GROWSDOWN or vma.status & whole):
        raise ValueError(f"{vma.start:#x}-{vma.end:#x} must stay whole")
    return [_piece(vma, low, high) for low, high in pairwise(edges)]


def _piece(vma: VmaEntry, start: int, end: int) -> VmaEntry:
    piece = copy_of(vma)
    if not vma.status & VMA_ANON_PRIVATE:  # anonymous private areas have no offset: always 0
        piece.pgoff += start - vma.start
    piece.start, piece.end = start, end
    return piece
