"""The page table walk in plain Python, which the native one is compared with.

Source: Intel SDM volume 3, chapter "Paging"; arch/x86/include/asm/pgtable_types.h.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from ovr._fastcopy import PROTNONE, USER, WRITE
from ovr.errors import GuestFault
from ovr.memory.addresses import PAGE_SHIFT, PAGE_SIZE, Gpa
from ovr.memory.ram import GuestRam

__all__ = [
    "PTE_ADDRESS",
    "PTE_PRESENT",
    "PTE_PROTNONE",
    "PTE_PSE",
    "PTE_RW",
    "PTE_USER",
    "Leaf",
    "reference_walk",
]

PTE_PRESENT: Final = 1 << 0
PTE_RW: Final = 1 << 1
PTE_USER: Final = 1 << 2
PTE_PSE: Final = 1 << 7
PTE_PROTNONE: Final = 1 << 8
PTE_ADDRESS: Final = 0x000F_FFFF_FFFF_F000


class Leaf(NamedTuple):
    """One mapped page, or the part of it that lies in the walked range. Sizes in bytes."""

    gva: int
    gpa: int
    size: int
    flags: int
    page_shift: int


def reference_walk(
    ram: GuestRam, root: Gpa, levels: int, ranges: Sequence[tuple[int, int]]
) -> Iterator[Leaf]:
    """Yield every leaf in the ``[start, end)`` ranges of GVAs, as `AddressSpace.walk` finds them.

    Raises:
        GuestFault: a table lies outside of RAM or has a reserved bit set.
    """
    for start, end in ranges:
        yield from _table(ram, root, levels, start, end)


def _table(ram: GuestRam, table: int, level: int, start: int, end: int) -> Iterator[Leaf]:
    shift = PAGE_SHIFT + 9 * (level - 1)
    try:
        entries = np.frombuffer(ram.read(Gpa(table), PAGE_SIZE), dtype="<u8")
    except GuestFault as error:
        raise GuestFault(f"no page table at GPA {table:#x}", table) from error
    at = start
    while at < end:
        until = min(((at >> shift) + 1) << shift, end)
        entry = int(entries[(at >> shift) & 511])
        leaf = level == 1 or (level <= 3 and bool(entry & PTE_PSE))
        if entry & PTE_PRESENT and not leaf:
            if entry & PTE_PSE:
                raise GuestFault(f"reserved bit set in page table at GPA {table:#x}", table)
            yield from _table(ram, entry & PTE_ADDRESS, level - 1, at, until)
        elif leaf and entry & (PTE_PRESENT | PTE_PROTNONE):
            yield _leaf(entry, shift, at, until)
        at = until


def _leaf(entry: int, shift: int, start: int, end: int) -> Leaf:
    mask = (1 << shift) - 1
    if entry & PTE_PRESENT:
        flags = (WRITE if entry & PTE_RW else 0) | (USER if entry & PTE_USER else 0)
        frame = entry & PTE_ADDRESS
    else:
        flags = PROTNONE
        frame = ~entry & PTE_ADDRESS
    return Leaf(start, (frame & ~mask) + (start & mask), end - start, flags, shift)
