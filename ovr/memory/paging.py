"""x86-64 page tables: address spaces on top of guest RAM, read by the native walk.

Source: Intel SDM volume 3, chapter "Paging"; arch/x86/include/asm/pgtable_types.h.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from ovr._fastcopy import PIECE
from ovr.errors import GuestFault
from ovr.memory.addresses import PAGE_SIZE, Gpa, Gva
from ovr.memory.extents import Extents
from ovr.memory.ram import GuestRam

__all__ = ["AddressSpace", "Frames", "pieces"]


@dataclass(frozen=True)
class Frames:
    """The location of the guest kernel's `struct page` array, and conditions on an element.

    A walk marks the pages that meet the conditions as `owned <ovr._fastcopy.OWNED>`.

    Attributes:
        root: GPA of the kernel's top-level page table, which has `levels` levels.
        vmemmap: GVA of the element for frame number 0.
        stride: ``sizeof(struct page)``, in bytes.
        flags: offset of ``page->flags`` in bytes; likewise `mapping` and `compound_head`.
        page_mask: the bits of the page's own flags that must all be set.
        folio_mask: the bits of its folio's flags that must be as in `folio_value`.
        mapping_mask: the bits of its folio's ``mapping`` that must be as in `mapping_value`.
        dirty_mask: the bits of its folio's flags that make reclaim keep its content; the dirty bits
            of the page table entry do the same.
        clean_mask: the bits of a clean folio's flags that must be as in `clean_value` for reclaim
            to keep its content nevertheless; 0 if it never does.
    """

    root: Gpa
    levels: int
    vmemmap: Gva
    stride: int
    flags: int
    mapping: int
    compound_head: int
    page_mask: int
    folio_mask: int
    folio_value: int
    mapping_mask: int
    mapping_value: int
    dirty_mask: int
    clean_mask: int
    clean_value: int

    @property
    def usable(self) -> bool:
        """Whether `AddressSpace.walk` takes it: all aligned, the members within an element."""
        last = max(self.flags, self.mapping, self.compound_head) + 8
        aligned = (self.vmemmap | self.stride) % 8 == 0
        return aligned and last <= self.stride <= PAGE_SIZE and self.mapping_mask != 0


MAX_READ: Final = 1 << 26
"""Most bytes of one read. Page tables may map one frame everywhere, and types may claim any size,
so the size of a guest does not bound the memory that a hostile one could make us allocate."""


class AddressSpace:
    """Guest RAM seen through one top-level page table.

    Args:
        ram: the guest's RAM.
        root: GPA of the top-level table (what CR3 holds, without its flag bits).
        levels: 4 or 5.

    Attributes:
        recorder: called with every value that a view is about to write; see
            `ovr.kernel.types.view.Recorder`.
    """

    def __init__(self, ram: GuestRam, root: Gpa, levels: int) -> None:
        self.recorder: Callable[[str, Gva, bytes, bytes], None] | None = None
        if levels not in (4, 5):
            raise ValueError(f"x86-64 page tables have 4 or 5 levels, not {levels}")
        self.ram = ram
        self.root = root
        self.levels = levels

    def translate(self, gva: Gva) -> Gpa:
        """Return the GPA behind `gva`. Raises `GuestFault` if it is not mapped."""
        if not 0 <= gva < 1 << 64:
            _check(gva, 1)
        return self.ram.translate(self.root, self.levels, gva)

    def read(self, gva: Gva, size: int) -> bytes:
        """Read `size` bytes, across pages.

        Raises:
            GuestFault: one is not mapped, or these are more than `MAX_READ`.
        """
        if 0 < size <= PAGE_SIZE - gva % PAGE_SIZE and 0 <= gva < 1 << 64:
            # the hot path of every member access: no call more than it needs
            ram = self.ram
            return ram.read(ram.translate(self.root, self.levels, gva), size)
        if size == 0:
            return b""
        if size > MAX_READ:
            raise GuestFault(f"{size:#x} bytes at {gva:#x} are too many for one read", gva)
        return b"".join(self.ram.read(gpa, length) for gpa, length in self._chunks(gva, size))

    def write(self, gva: Gva, data: bytes) -> None:
        """Write `data`, across pages; nothing is written if one of them is not mapped."""
        if not data:
            return
        # SAFETY: the caller states the owner of the object at `gva`, and what keeps it still; here
        # the bytes are only kept within guest RAM.
        if len(data) <= PAGE_SIZE - gva % PAGE_SIZE:
            self.ram.write(self.translate(gva), data)
            return
        done = 0
        for gpa, length in list(self._chunks(gva, len(data))):
            self.ram.write(gpa, data[done : done + length])
            done += length

    def walk(
        self, ranges: Extents, frames: Frames | None = None, *, soft_dirty: bool = False
    ) -> Extents:
        """Return the mapped runs of `ranges` (see `_fastcopy.RamMap.walk`)."""
        return self.ram.walk(self.root, self.levels, ranges, frames, soft_dirty=soft_dirty)

    def _chunks(self, gva: Gva, size: int) -> Iterator[tuple[Gpa, int]]:
        # Physically contiguous parts: one walk instead of a translation for each page.
        _check(gva, size)
        first = gva - gva % PAGE_SIZE
        until = -(-(gva + size) // PAGE_SIZE) * PAGE_SIZE
        at = int(gva)
        for run in self.walk(pieces([(first, until - first, 0)])).tolist():
            run_gva, gpa, length = run[:3]
            if run_gva > at:
                break
            part = min(run_gva + length, gva + size) - at
            yield Gpa(gpa + at - run_gva), part
            at += part
        if at < gva + size:
            raise GuestFault(f"guest virtual address {at:#x} is not mapped", at)


def _check(gva: int, size: int) -> None:
    # Addresses computed from guest data may be anything.
    if gva < 0 or size < 1 or gva + size > 1 << 64:
        raise GuestFault(f"{gva:#x}+{size:#x} is no guest virtual range", gva)


def pieces(ranges: Iterable[tuple[int, int, int]]) -> Extents:
    """Return a `_fastcopy.PIECE` array from (GVA, size in bytes, source offset) tuples."""
    return np.array(list(ranges), dtype=PIECE)
