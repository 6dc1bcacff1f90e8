"""Guest RAM: slots of guest physical memory, each a range of a RAM file on the host.

Knows no kernel and no page tables. Every byte that `ovr` writes to a guest goes through
`GuestRam.write` (single values), or `copy_in`, `copy_from` or `copy_across` (pages), and so through
the bounds checks of `_fastcopy.RamMap`, and through the gate of the hold that governs it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovr._fastcopy import Hold, RamMap
from ovr.errors import RamNotShared
from ovr.host.closing import Closing
from ovr.memory.addresses import PAGE_SIZE, Gpa, Gva, Offset
from ovr.memory.extents import Extents

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["GuestRam", "RamFile", "Slot"]


class RamFile:
    """An open RAM file; closed when nothing refers to it any more.

    It is mapped through the descriptor by which it was found, and never opened by name: the name
    may belong to another file by now.

    Args:
        fd: the descriptor, which this object owns from now on. Of a VM's RAM it is QEMU's own open
            file description (`ovr.vm.process_files`): its file offset must not be moved.
        name: the name of the file in messages.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name

    def __del__(self) -> None:
        os.close(self._fd)

    def __repr__(self) -> str:
        return f"RamFile({self._fd}, {self.name!r})"

    def fileno(self) -> int:
        """Return the descriptor, which this object goes on owning."""
        return self._fd

    def reopened(self) -> int:
        """Return a read-only descriptor with a file offset and locks of its own.

        The caller closes it.

        Raises:
            RamNotShared: we may not read the file.
        """
        try:
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RamNotShared(
                f"the VM's RAM file {self.name} cannot be opened: {error.strerror}",
                "run as a user who may read and write it, while the VM runs",
            ) from error


@dataclass(frozen=True)
class Slot:
    """A contiguous piece of GPA space backed by one range of one RAM file. Sizes in bytes."""

    gpa: Gpa
    size: int
    file: RamFile
    offset: Offset

    @property
    def end(self) -> Gpa:
        """The first address after the slot."""
        return Gpa(self.gpa + self.size)


class GuestRam(Closing):
    """All of a guest's RAM, mapped into this process; a context manager.

    Args:
        slots: the backing of GPA space; sorted and checked for overlap here.
        writable: map for writing; off for tools that only read.
        unheld: permit writes without a hold: for RAM in which no VM runs.

    Raises:
        RamNotShared: a RAM file is too short or cannot be mapped, such as one that is open for
            reading only when `writable`.
    """

    def __init__(
        self, slots: Sequence[Slot], *, writable: bool = False, unheld: bool = False
    ) -> None:
        self.slots = tuple(sorted(slots, key=lambda slot: slot.gpa))
        self.writable = writable
        _check(self.slots)
        native = [(slot.gpa, slot.size, slot.file.fileno(), slot.offset) for slot in self.slots]
        try:
            self._map = RamMap(native, writable=writable, unheld=unheld)
        except (OSError, ValueError) as error:
            raise RamNotShared(
                f"guest RAM cannot be mapped: {error}",
                "is the VM's RAM file still the one that QEMU uses?",
            ) from error

    def close(self) -> None:
        """Unmap the files; later accesses raise `GuestFault`."""
        self._map.close()

    def govern(self, hold: Hold) -> None:
        """Permit writes only in this hold from now on; see `_fastcopy.RamMap.govern`."""
        self._map.govern(hold)

    @property
    def size(self) -> int:
        """Bytes of RAM in all slots."""
        return sum(slot.size for slot in self.slots)

    def read(self, gpa: Gpa, size: int) -> bytes:
        """Read `size` bytes. Raises `GuestFault` if any of them is not RAM."""
        return self._map.read(gpa, size)

    def write(self, gpa: Gpa, data: "Buffer") -> None:
        """Write a value; aligned 4- and 8-byte values are stored whole.

        Raises:
            GuestFault: a byte is outside of RAM; nothing was written.
            PermissionError: the VM is not held; nothing was written.
            HoldBroken: the hold has ended; nothing was written.
        """
        self._map.write(gpa, data)

    def find(self, needle: bytes, *, step: int = 1) -> Iterator[Gpa]:
        """Yield the addresses of `needle` in allocated RAM, in order, at multiples of `step` bytes.

        Holes of the RAM files (pages that the guest never touched) are skipped, so that a search
        does not make the host allocate them.
        """
        for slot in self.slots:
            for start, end in _allocated(slot):
                at = self._map.find(start, end, needle, step)
                while at >= 0:
                    yield Gpa(at)
                    at = self._map.find(at + step, end, needle, step)

    def translate(self, root: Gpa, levels: int, gva: Gva) -> Gpa:
        """See `_fastcopy.RamMap.translate`."""
        return Gpa(self._map.translate(root, levels, gva))

    def walk(
        self, root: Gpa, levels: int, pieces: Extents, frames: Any = None,
        *, soft_dirty: bool = False,
    ) -> Extents:  # fmt: skip
        """See `_fastcopy.RamMap.walk`."""
        return self._map.walk(root, levels, pieces, frames, soft_dirty=soft_dirty)

    def prefault(self, runs: Extents) -> None:
        """See `_fastcopy.RamMap.prefault`."""
        self._map.prefault(runs)

    def copy_in(self, runs: Extents, fd: int, base: int, size: int, *, wait: bool = True) -> int:
        """See `_fastcopy.RamMap.copy_in`; the caller states why the frames stay."""
        return self._map.copy_in(runs, fd, base, size, wait=wait)

    def copy_from(self, runs: Extents, source: "Buffer") -> int:
        """See `_fastcopy.RamMap.copy_from`; the caller states why the frames stay."""
        return self._map.copy_from(runs, source)

    def copy_across(self, runs: Extents, other: "GuestRam") -> int:
        """See `_fastcopy.RamMap.copy_across`; the caller states why the frames stay."""
        return self._map.copy_across(runs, other._map)

    def copy_to(self, runs: Extents, target: "Buffer", zero: NDArray[np.uint8]) -> int:
        """See `_fastcopy.RamMap.copy_to`."""
        return self._map.copy_to(runs, target, zero)

    def review(
        self, runs: Extents, fd: int, base: int, size: int, *, wait: bool = True
    ) -> tuple[int, Gva | None]:
        """See `_fastcopy.RamMap.review`."""
        compared, at = self._map.review(runs, fd, base, size, wait=wait)
        return compared, None if at is None else Gva(at)

    def first_difference(self, runs: Extents, source: "Buffer") -> Gva | None:
        """See `_fastcopy.RamMap.first_difference`."""
        at = self._map.first_difference(runs, source)
        return None if at is None else Gva(at)

    def first_difference_across(self, runs: Extents, other: "GuestRam") -> Gva | None:
        """See `_fastcopy.RamMap.first_difference_across`."""
        at = self._map.first_difference_across(runs, other._map)
        return None if at is None else Gva(at)


def _check(slots: Sequence[Slot]) -> None:
    if not slots:
        raise RamNotShared("the VM has no RAM that is backed by a file")
    for slot in slots:
        if slot.size <= 0 or (slot.gpa | slot.size | slot.offset) % PAGE_SIZE:
            raise ValueError(f"slot at GPA {slot.gpa:#x} is not a range of whole pages")
    for one, two in pairwise(slots):
        if one.end > two.gpa:
            raise ValueError(f"slots at GPA {one.gpa:#x} and {two.gpa:#x} overlap")


def _allocated(slot: Slot) -> Iterator[tuple[Gpa, Gpa]]:
    # GPA ranges of the slot whose file pages exist (SEEK_DATA, SEEK_HOLE).
    fd = slot.file.reopened()  # QEMU's own file offset must stay where it is
    try:
        end = slot.offset + slot.size
        at = int(slot.offset)
        while at < end:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: no data up to the end of the file
                return
            at = min(os.lseek(fd, start, os.SEEK_HOLE), end)
            if start < at:
                yield Gpa(slot.gpa + start - slot.offset), Gpa(slot.gpa + at - slot.offset)
    finally:
        os.close(fd)
