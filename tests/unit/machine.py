"""A machine made of a RAM file and hand-written page tables: walks need no VM."""

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from ovr.memory.addresses import PAGE_SIZE, Gpa, Gva, Offset
from ovr.memory.ram import GuestRam, RamFile, Slot
from tests.unit.reference_walk import (
    PTE_ADDRESS,
    PTE_PRESENT,
    PTE_PROTNONE,
    PTE_PSE,
    PTE_RW,
    PTE_USER,
)


def ram_file(path: Path, mode: int = os.O_RDWR) -> RamFile:
    """Open a file as RAM, as QEMU would."""
    return RamFile(os.open(path, mode | os.O_CLOEXEC), str(path))


@dataclass
class Machine:
    """Slots with gaps between them, as around a PCI hole, each in a file of its own."""

    ram: GuestRam
    levels: int
    root: Gpa
    _next_table: int
    tables: list[Gpa] = field(default_factory=list)

    @classmethod
    def build(cls, directory: Path, *, levels: int = 4, sizes: tuple[int, ...] = (8 << 20,)):
        slots = []
        gpa = 0
        for number, size in enumerate(sizes):
            path = directory / f"ram{number}"
            path.touch()
            # A file offset that differs from the GPA: mixing the two up must fail.
            offset = 3 * PAGE_SIZE
            with path.open("r+b") as file:
                file.truncate(offset + size)
            slots.append(Slot(Gpa(gpa), size, ram_file(path), Offset(offset)))
            gpa += size + (2 << 20)
        ram = GuestRam(slots, writable=True, unheld=True)
        machine = cls(ram, levels, Gpa(PAGE_SIZE), 2 * PAGE_SIZE)
        machine.tables.append(machine.root)
        return machine

    def entry(self, table: int, index: int) -> int:
        return struct.unpack("<Q", self.ram.read(Gpa(table + 8 * index), 8))[0]

    def set_entry(self, table: int, index: int, value: int) -> None:
        self.ram.write(Gpa(table + 8 * index), struct.pack("<Q", value & (1 << 64) - 1))

    def new_table(self) -> Gpa:
        table = Gpa(self._next_table)
        self._next_table += PAGE_SIZE
        self.ram.write(table, bytes(PAGE_SIZE))
        self.tables.append(table)
        return table

    def map(
        self,
        gva: int,
        gpa: int,
        *,
        shift: int = 12,
        flags: int = PTE_RW | PTE_USER,
        protnone: bool = False,
    ) -> None:
        """Map one page of 2**shift bytes, as the kernel would."""
        table = self.root
        for level in range(self.levels, (shift - 12) // 9 + 1, -1):
            index = gva >> (12 + 9 * (level - 1)) & 511
            entry = self.entry(table, index)
            if not entry & PTE_PRESENT:
                entry = self.new_table() | PTE_PRESENT | PTE_RW | PTE_USER
                self.set_entry(table, index, entry)
            assert not entry & PTE_PSE or level > 3, "already mapped by a larger page"
            table = Gpa(entry & PTE_ADDRESS)
        huge = PTE_PSE if shift > 12 else 0
        if protnone:
            kept = flags & ~(PTE_RW | PTE_USER)
            entry = (~gpa & PTE_ADDRESS) | PTE_PROTNONE | huge | kept
        else:
            entry = gpa | PTE_PRESENT | flags | huge
        self.set_entry(table, gva >> shift & 511, entry)


def canonical(gva: int, levels: int) -> Gva:
    """Sign-extend the way the MMU wants it."""
    bits = 12 + 9 * levels
    gva &= (1 << bits) - 1
    return Gva(gva | ((1 << 64) - (1 << bits)) if gva >> (bits - 1) else gva)
