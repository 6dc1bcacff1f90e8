"""The memory map: the files on the host that back guest-physical memory, as QEMU reports them.

It joins three answers, so that nothing depends on names of files: the flat view of the guest's
address space lists RAM, ``gpa2hva`` gives the address at which QEMU has it mapped, and
``/proc/PID/maps`` the file of that mapping, and whether QEMU shares it and writes to it. So
memfds, deleted files, NUMA nodes, DIMMs and the hole below 4 GiB need no special cases.

Expected output of ``info mtree -f`` (QEMU 7.2.22, q35 with 4 GiB in two NUMA nodes; I/O left out)::

    FlatView #3
     AS "memory", root: system
     AS "cpu-memory-0", root: system
     Root memory region: system
      0000000000000000-00000000000c2fff (prio 0, ram): ram0
      00000000000c3000-00000000000e7fff (prio 0, rom): ram0 @00000000000c3000
      00000000000e8000-00000000000effff (prio 0, ram): ram0 @00000000000e8000
      00000000000f0000-00000000000fffff (prio 0, rom): ram0 @00000000000f0000
      0000000000100000-000000007fffffff (prio 0, ram): ram0 @0000000000100000
      00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
      0000000100000000-000000017fffffff (prio 0, ram): ram1

Machine types before 4.0 call the region ``/objects/ram0``; a DIMM's has the name of its backend.
"""

import os
import re
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final

from ovr.errors import CheckFailed, RamNotShared, VmUnreachable
from ovr.memory.addresses import PAGE_SIZE, Gpa, Offset
from ovr.memory.ram import Slot
from ovr.vm.process_files import SHARE_IT, Mapping, ProcessFiles
from ovr.vm.qmp import Monitor

__all__ = ["RamRange", "guest_slots", "ram_ranges"]

_RANGE = re.compile(r" *([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ([\w/-]+)\): (\S+)")
_HVA = re.compile(r"Host virtual address for 0x[0-9a-f]+ \(.*\) is 0x([0-9a-f]{1,16})\s*")
_RANGES_LIMIT = 4096
_PATIENCE: Final = 60.0  # seconds for all queries together: each could be answered late
_BECOME = "run as root, or as the user that runs QEMU, on its host"


@dataclass(frozen=True)
class RamRange:
    """A piece of guest-physical address space that is RAM: bytes ``[gpa, gpa + size)``."""

    gpa: Gpa
    size: int
    region: str


@dataclass(frozen=True)
class _Piece:
    """A part of a `RamRange` in QEMU's address space; `mapping` is its first mapping."""

    gpa: Gpa
    size: int
    offset: Offset
    mapping: Mapping

    @property
    def file(self) -> tuple[int, int, str]:
        """Identity of its file, for as long as the file is mapped."""
        return self.mapping.device, self.mapping.inode, self.mapping.path

    @property
    def place(self) -> tuple[object, ...]:
        """Its file, and the bytes of it."""
        return self.gpa, self.size, self.offset, self.file


def guest_slots(qmp: Monitor) -> tuple[Slot, ...]:
    """Return the slots of the guest's RAM, ascending.

    RAM that the firmware made read-only (below 1 MiB) is left out: no task has pages there.

    File and offset come from QEMU. A process that poses as QEMU can make ovr map only files that it
    has itself mapped for writing (`ProcessFiles`).

    Raises:
        RamNotShared: some RAM is not a mapping of a regular file that QEMU shares and writes to,
            or its file is gone, or too short.
        CheckFailed: QEMU's memory map cannot be read or understood, or changed meanwhile.
        VmUnreachable: QMP broke, or the answers take too long.
    """
    until = time.monotonic() + _PATIENCE
    shared = _backends(qmp)
    ranges = [found for found in ram_ranges(qmp.human("info mtree -f")) if found.region in shared]
    if not ranges:
        raise RamNotShared("the VM has no RAM in a memory backend", SHARE_IT)
    for found in ranges:
        if not shared[found.region]:
            raise RamNotShared(f"the VM's RAM {found.region} is private to QEMU", SHARE_IT)
    with ProcessFiles(_qemu_pid(qmp)) as process:
        process.check_owner(qmp.owner)
        addresses = [_address(qmp, found.gpa, until) for found in ranges]
        pieces = _all_pieces(ranges, addresses, process.mappings())
        files = {piece.file: process.open_mapped(piece.mapping) for piece in _one_a_file(pieces)}
        # Our open files keep their inode numbers: an equal number now means the same file.
        again = _all_pieces(ranges, addresses, process.mappings())
        if [piece.place for piece in again] != [piece.place for piece in pieces]:
            raise CheckFailed("QEMU's memory map changed while it was read", "try again")
    slots = tuple(Slot(piece.gpa, piece.size, files[piece.file], piece.offset) for piece in pieces)
    for slot in slots:
        _check_size(slot)
    return slots


def ram_ranges(mtree: str) -> list[RamRange]:
    """Return the writable RAM of the guest's address space, from the text of ``info mtree -f``.

    Ranges are cut to whole pages.

    Raises:
        CheckFailed: the text has no flat view of the address space "memory", or damaged ones.
    """
    ranges: list[RamRange] = []
    last = 0
    for line in _system_view(mtree):
        match = _RANGE.match(line)
        if match is None or match[3] not in {"ram", "nv-ram"}:
            continue
        start = -(-int(match[1], 16) // PAGE_SIZE) * PAGE_SIZE
        end = (int(match[2], 16) + 1) // PAGE_SIZE * PAGE_SIZE
        if start < last or len(ranges) == _RANGES_LIMIT:
            raise CheckFailed("QEMU's memory map (info mtree -f) is invalid", "is this QEMU?")
        if start < end:
            ranges.append(RamRange(Gpa(start), end - start, match[4]))
            last = end
    return ranges


def _system_view(mtree: str) -> list[str]:
    for view in mtree.split("FlatView #")[1:]:
        lines = view.splitlines()
        if any(line.strip().startswith('AS "memory",') for line in lines):
            return lines
    raise CheckFailed(
        "QEMU's memory map (info mtree -f) cannot be parsed", "QEMU 5.0 or later is needed"
    )


def _backends(qmp: Monitor) -> dict[str, bool]:
    # Names of the backends' memory regions, and whether the backend is shared.
    shared = {}
    for backend in _list(qmp.execute("query-memdev")):
        name = str(backend.get("id"))
        shared[name] = shared[f"/objects/{name}"] = backend.get("share") is True
    return shared


def _list(answer: Any) -> list[dict[str, Any]]:
    return [item for item in answer if isinstance(item, dict)] if isinstance(answer, list) else []


def _qemu_pid(qmp: Monitor) -> int:
    if pid := qmp.qemu_pid:
        return pid
    raise CheckFailed("QEMU runs in a pid namespace that cannot be seen from here", _BECOME)


def _address(qmp: Monitor, gpa: Gpa, until: float) -> int:
    if time.monotonic() > until:
        raise VmUnreachable(f"QEMU did not report its RAM within {_PATIENCE:g} s")
    answer = qmp.human(f"gpa2hva {gpa:#x}")
    if match := _HVA.fullmatch(answer):
        return int(match[1], 16)
    raise CheckFailed(f"QEMU does not report the address of GPA {gpa:#x}: {answer.strip()[:100]}")


def _all_pieces(
    ranges: Sequence[RamRange], addresses: Sequence[int], mappings: Sequence[Mapping]
) -> list[_Piece]:
    starts = [mapping.start for mapping in mappings]
    pieces: list[_Piece] = []
    for found, address in zip(ranges, addresses, strict=True):
        first = max(bisect_right(starts, address) - 1, 0)
        pieces += _pieces(found, address, islice(mappings, first, None))
    return list(_joined(pieces))


def _pieces(found: RamRange, address: int, mappings: Iterable[Mapping]) -> Iterator[_Piece]:
    # The range in QEMU's address space; madvise may have split the mapping into several.
    at, end = address, address + found.size
    for mapping in mappings:
        if not mapping.start <= at < min(mapping.end, end):
            break
        if not mapping.shared:
            raise RamNotShared(f"the VM's RAM {found.region} is a private mapping", SHARE_IT)
        if not mapping.writable:
            raise RamNotShared(f"QEMU may not write to the VM's RAM {found.region}", SHARE_IT)
        part = min(mapping.end, end) - at
        offset = Offset(mapping.offset + at - mapping.start)
        yield _Piece(Gpa(found.gpa + at - address), part, offset, mapping)
        at += part
    if at < end:
        raise RamNotShared(f"the VM's RAM {found.region} is not mapped from a file", SHARE_IT)


def _joined(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    last: _Piece | None = None
    for piece in pieces:
        if last and (last.gpa + last.size, last.file, last.offset + last.size) == (
            piece.gpa, piece.file, piece.offset,
        ):  # fmt: skip
            last = replace(last, size=last.size + piece.size)
            continue
        if last:
            yield last
        last = piece
    if last:
        yield last


def _one_a_file(pieces: Sequence[_Piece]) -> list[_Piece]:
    return list({piece.file: piece for piece in pieces}.values())


def _check_size(slot: Slot) -> None:
    size = os.fstat(slot.file.fileno()).st_size
    if size < slot.offset + slot.size:
        raise RamNotShared(
            f"the VM's RAM file {slot.file.name} has {size} bytes, but QEMU uses"
            f" {slot.offset + slot.size}",
            "is this QEMU? If it is, restart the VM: its RAM file was truncated",
        )
