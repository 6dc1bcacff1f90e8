"""Memory: a process's page table and VMAs.

Source: include/linux/mm_types.h, include/linux/mm.h.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from ovr.errors import GuestFault
from ovr.kernel.kernel import Kernel
from ovr.kernel.linux.maple import MAX_INDEX, mt_for_each
from ovr.kernel.linux.rbtree import rbtree_for_each_entry
from ovr.kernel.types.live import settled
from ovr.kernel.types.view import Struct
from ovr.memory.addresses import PAGE_SIZE, Gva
from ovr.memory.paging import AddressSpace

__all__ = [
    "VM_DONTCOPY",
    "VM_DONTDUMP",
    "VM_EXEC",
    "VM_GROWSDOWN",
    "VM_HUGETLB",
    "VM_IO",
    "VM_LOCKED",
    "VM_MERGEABLE",
    "VM_NOHUGEPAGE",
    "VM_NORESERVE",
    "VM_PFNMAP",
    "VM_READ",
    "VM_SHARED",
    "VM_SOFTDIRTY",
    "VM_WIPEONFORK",
    "VM_WRITE",
    "Vma",
    "anon_vma_users",
    "find_vma",
    "for_each_vma",
    "mm_space",
    "vmas",
]

VM_READ: Final = 0x1
VM_WRITE: Final = 0x2
VM_EXEC: Final = 0x4
VM_SHARED: Final = 0x8
VM_GROWSDOWN: Final = 0x100
VM_PFNMAP: Final = 0x400
VM_LOCKED: Final = 0x2000
VM_IO: Final = 0x4000
VM_DONTCOPY: Final = 0x2_0000
VM_NORESERVE: Final = 0x20_0000
VM_HUGETLB: Final = 0x40_0000
VM_WIPEONFORK: Final = 0x200_0000
VM_DONTDUMP: Final = 0x400_0000
VM_SOFTDIRTY: Final = 0x800_0000  # where CONFIG_MEM_SOFT_DIRTY is set
VM_NOHUGEPAGE: Final = 0x4000_0000
VM_MERGEABLE: Final = 0x8000_0000


@dataclass(frozen=True)
class Vma:
    """One mapping of a process.

    Attributes:
        start: its first address; `end`: the first address after it.
        flags: ``vm_flags``.
        offset: its start in the file, in bytes; undefined without a file.
        file: whether a file is mapped.
        anonymous: whether its pages are anonymous from the start (``vma_is_anonymous()``).
    """

    start: Gva
    end: Gva
    flags: int
    offset: int
    file: bool
    anonymous: bool

    @property
    def shared(self) -> bool:
        """Whether other processes see its writes (``VM_SHARED``)."""
        return bool(self.flags & VM_SHARED)


def mm_space(kernel: Kernel, mm: Struct) -> AddressSpace:
    """Return guest memory as the tasks of a ``struct mm_struct`` see it.

    With page table isolation ``mm->pgd`` is the kernel's half of a pair of tables, which also
    maps everything in the user's half.
    """
    root = kernel.space.translate(mm.pgd.address_)
    if root % PAGE_SIZE:
        raise GuestFault(f"mm_struct.pgd is {mm.pgd.address_:#x}, no page table", mm.pgd.address_)
    return AddressSpace(kernel.ram, root, kernel.space.levels)


def for_each_vma(mm: Struct, first: int = 0, last: int = MAX_INDEX) -> Iterator[Any]:
    """Yield every ``struct vm_area_struct`` of a ``struct mm_struct``, ascending.

    Args:
        mm: the process's memory.
        first: the first address to look at.
        last: the last one.

    Raises:
        GuestFault: the tree is invalid, or changed while it was read; or a VMA has parts of pages.
    """
    # Linux kernel commit d4af56c5c7c6 ("mm: start tracking VMAs with maple tree") (in v6.1)
    for low, high, entry in mt_for_each(mm.mm_mt, first, last):
        vma = mm.types_.pointer("struct vm_area_struct", mm.space_, entry)
        if (vma.vm_start, vma.vm_end) != (low, high + 1):
            raise GuestFault(f"the VMA at {entry:#x} is not the one for {low:#x}", entry)
        if low % PAGE_SIZE or (high + 1) % PAGE_SIZE:
            raise GuestFault(f"the VMA at {entry:#x} is not a range of whole pages", entry)
        yield vma


def find_vma(mm: Struct, address: Gva) -> Any:
    """Return the ``struct vm_area_struct`` that holds an address, or None.

    Raises:
        GuestFault: the tree is invalid each time it is read.
    """

    def find() -> Any:
        return next(for_each_vma(mm, address, address), None)

    return settled(find)


def anon_vma_users(anon_vma: Struct) -> set[Gva]:
    """Return the address of every ``struct mm_struct`` that may map pages of an ``anon_vma``.

    Raises:
        GuestFault: its tree is invalid each time it is read.
    """

    def find() -> set[Gva]:
        chains = rbtree_for_each_entry("struct anon_vma_chain", anon_vma.rb_root.rb_root, "rb")
        return {chain.vma.vm_mm.address_ for chain in chains}

    return settled(find)


def vmas(mm: Struct) -> list[Vma]:
    """Return all mappings of a process, ascending.

    Raises:
        GuestFault: they are invalid each time they are read.
    """
    return settled(lambda: [_describe(vma) for vma in for_each_vma(mm)])


def _describe(vma: Struct) -> Vma:
    return Vma(
        start=Gva(vma.vm_start),
        end=Gva(vma.vm_end),
        flags=vma.vm_flags,
        offset=vma.vm_pgoff * PAGE_SIZE,
        file=bool(vma.vm_file),
        anonymous=not vma.vm_ops,
    )
