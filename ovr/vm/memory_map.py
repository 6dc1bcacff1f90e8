"""Which part of guest-physical memory lies in which file on the host, asked of QEMU itself.

Three answers are joined, so that nothing depends on how files are named: the flat view of the
guest's address space says what is RAM, ``gpa2hva`` where QEMU has it mapped, and
``/proc/PID/maps`` which file that mapping is of, and whether it is shared. So memfds, deleted
files, NUMA nodes, DIMMs and the hole below 4 GiB need no special cases.

Expected of ``info mtree -f`` (QEMU 7.2.22, q35 with 4 GiB in two NUMA nodes; I/O left out)::

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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ovr.addresses import PAGE_SIZE, Gpa, Offset
from ovr.errors import CheckFailed, RamNotShared
from ovr.ram import Slot
from ovr.vm.qmp import Monitor

__all__ = ["Mapping", "RamRange", "guest_slots", "parse_maps", "ram_ranges"]

_RANGE = re.compile(r" *([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ([\w/-]+)\): (\S+)")
_HVA = re.compile(r"Host virtual address for 0x[0-9a-f]+ \(.*\) is 0x([0-9a-f]{1,16})\s*")
_MAPPING = re.compile(
    r"([0-9a-f]{1,16})-([0-9a-f]{1,16}) ..(.)([sp]) ([0-9a-f]+) [0-9a-f]+:[0-9a-f]+ (\d+) *(.*)"
)
_RANGES_LIMIT = 4096
_SHARE_IT = (
    "start QEMU with -object memory-backend-file,id=ram,size=SIZE,mem-path=/dev/shm/vm,share=on "
    "-machine memory-backend=ram (libvirt: <memoryBacking><source type='memfd'/>"
    "<access mode='shared'/></memoryBacking>)"
)
_BECOME = "run as root, or as the user that runs QEMU, on its host"


@dataclass(frozen=True)
class RamRange:
    """A piece of guest-physical address space that is RAM: bytes ``[gpa, gpa + size)``."""

    gpa: Gpa
    size: int
    region: str


@dataclass(frozen=True)
class Mapping:
    """A line of ``/proc/PID/maps``: addresses ``[start, end)`` of the process."""

    start: int
    end: int
    shared: bool
    offset: int
    inode: int
    path: str


def guest_slots(qmp: Monitor) -> tuple[Slot, ...]:
    """Return what backs the guest's RAM, ascending.

    RAM that the firmware made read-only (below 1 MiB) is left out: no page of it is a task's.

    Raises:
        RamNotShared: some RAM is not a shared mapping of a file, or its file is gone.
        CheckFailed: QEMU's memory map cannot be read or understood.
        VmUnreachable: QMP broke.
    """
    shared = _backends(qmp)
    ranges = [found for found in ram_ranges(qmp.human("info mtree -f")) if found.region in shared]
    if not ranges:
        raise RamNotShared("the VM has no RAM in a memory backend", _SHARE_IT)
    for found in ranges:
        if not shared[found.region]:
            raise RamNotShared(f"the VM's RAM {found.region} is private to QEMU", _SHARE_IT)
    process = Path(f"/proc/{_qemu_pid(qmp)}")
    mappings = parse_maps(_text_of(process / "maps"))
    files = _open_files(process)
    slots: list[Slot] = []
    for found in ranges:
        slots += _slots(found, _address(qmp, found.gpa), mappings, files)
    return tuple(_joined(slots))


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
            raise CheckFailed("QEMU's memory map (info mtree -f) makes no sense", "is this QEMU?")
        if start < end:
            ranges.append(RamRange(Gpa(start), end - start, match[4]))
            last = end
    return ranges


def parse_maps(text: str) -> list[Mapping]:
    """Return the lines of a ``/proc/PID/maps`` that are mappings of files, ascending."""
    found = []
    for line in text.splitlines():
        match = _MAPPING.fullmatch(line)
        if match and int(match[6]):
            start, end, offset = (int(match[number], 16) for number in (1, 2, 5))
            found.append(Mapping(start, end, match[4] == "s", offset, int(match[6]), match[7]))
    return found


def _system_view(mtree: str) -> list[str]:
    for view in mtree.split("FlatView #")[1:]:
        lines = view.splitlines()
        if any(line.strip().startswith('AS "memory",') for line in lines):
            return lines
    raise CheckFailed(
        "QEMU's memory map (info mtree -f) was not understood", "QEMU 5.0 or later is needed"
    )


def _backends(qmp: Monitor) -> dict[str, bool]:
    # Names that memory regions of the backends have, and whether the backend is shared.
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


def _address(qmp: Monitor, gpa: Gpa) -> int:
    answer = qmp.human(f"gpa2hva {gpa:#x}")
    if match := _HVA.fullmatch(answer):
        return int(match[1], 16)
    raise CheckFailed(f"QEMU does not say where it has GPA {gpa:#x}: {answer.strip()[:100]}")


def _text_of(path: Path) -> str:
    try:
        return os.fsdecode(path.read_bytes())
    except OSError as error:
        raise CheckFailed(f"QEMU's {path} cannot be read: {error.strerror}", _BECOME) from error


def _open_files(process: Path) -> dict[tuple[str, int], str]:
    # (name, inode) of QEMU's open files → a path that opens them, even if they have no name.
    files = {}
    try:
        for entry in (process / "fd").iterdir():
            try:
                files[str(entry.readlink()), entry.stat().st_ino] = str(entry)
            except OSError:  # closed meanwhile
                continue
    except OSError as error:
        raise CheckFailed(f"{process}/fd cannot be read: {error.strerror}", _BECOME) from error
    return files


def _slots(
    found: RamRange,
    address: int,
    mappings: Sequence[Mapping],
    files: dict[tuple[str, int], str],
) -> Iterator[Slot]:
    # The range as QEMU has it mapped; madvise may have split the mapping into several.
    at, end = address, address + found.size
    for mapping in mappings:
        if not mapping.start <= at < min(mapping.end, end):
            continue
        if not mapping.shared:
            raise RamNotShared(f"the VM's RAM {found.region} is a private mapping", _SHARE_IT)
        part = min(mapping.end, end) - at
        offset = Offset(mapping.offset + at - mapping.start)
        yield Slot(Gpa(found.gpa + at - address), part, _path(mapping, files), offset)
        at += part
    if at < end:
        raise RamNotShared(f"the VM's RAM {found.region} is not mapped from a file", _SHARE_IT)


def _path(mapping: Mapping, files: dict[tuple[str, int], str]) -> str:
    held = files.get((mapping.path.replace("\\012", "\n"), mapping.inode))
    if held is None:
        raise RamNotShared(
            f"the VM's RAM file {mapping.path} is gone: QEMU itself has closed it", _SHARE_IT
        )
    with suppress(OSError):  # its name is nicer to read, where it still is the same file
        if Path(mapping.path).samefile(held):
            return mapping.path
    return held


def _joined(slots: Sequence[Slot]) -> Iterator[Slot]:
    last: Slot | None = None
    for slot in slots:
        if last and (last.end, last.path, last.offset + last.size) == (
            slot.gpa, slot.path, slot.offset,
        ):  # fmt: skip
            last = replace(last, size=last.size + slot.size)
            continue
        if last:
            yield last
        last = slot
    if last:
        yield last
