"""/proc/PID/smaps of a tree, without what varies by chance."""

import re
from collections.abc import Iterable

from ovr import lab

_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) \S+ \d+ *(.*)$")
_FIGURE = re.compile(r"^(\w+): +(\d+) kB$")
_MARK = "== "
# Depends on the last access to a page; sizes that follow from the bounds.
_CHANCE = {"Referenced", "Size", "KernelPageSize", "MMUPageSize"}
# Which unchanged pages of a file are mapped depends on what the page cache has at a fault.
_CHANCE_OF_FILES = {"Rss", "Pss", "Shared_Clean", "Private_Clean"}


class Area:
    """One line of maps with its figures, in KiB.

    Neighbours that are alike are one: whether the kernel joins two areas depends on when their
    first pages came, which no process can tell.
    """

    def __init__(self, start: int, end: int, kind: tuple[str, ...], offset: int) -> None:
        self.start, self.end, self.kind, self.offset = start, end, kind, offset
        self.flags = ""
        self.figures: dict[str, int] = {}

    def continues(self, before: "Area") -> bool:
        """Whether the two could be one area."""
        alike = (self.start, self.kind, self.flags) == (before.end, before.kind, before.flags)
        return alike and self.offset in (0, before.offset + before.end - before.start)

    def extend(self, other: "Area") -> None:
        """Make one of the two."""
        self.end = other.end
        for name, figure in other.figures.items():
            self.figures[name] = self.figures.get(name, 0) + figure

    def __repr__(self) -> str:
        figures = " ".join(f"{name}={figure}" for name, figure in sorted(self.figures.items()))
        what = " ".join(self.kind)
        return f"{self.start:x}-{self.end:x} {what} {self.offset:x} [{self.flags}] {figures}"


def memory_of(vm: lab.LabVm, pids: Iterable[int]) -> dict[int, list[Area]]:
    """Return the areas of each process, by its pid in its own namespace."""
    command = showing(" ".join(map(str, pids)))
    return as_areas(vm.sh(command, timeout=240).stdout.decode())


def showing(pids: str) -> str:
    """Return a command of the guest's shell that prints what `as_areas` reads.

    Of a process that has just gone it prints nothing.
    """
    show = f"n=$(grep NSpid /proc/$p/status) && echo '{_MARK}'$n && cat /proc/$p/smaps"
    return f"for p in {pids}; do {show}; done"


def as_areas(text: str) -> dict[int, list[Area]]:
    """Return the areas of each process, by its pid in its own namespace."""
    found: dict[int, list[Area]] = {}
    areas: list[Area] = []
    for line in text.splitlines():
        if line.startswith(_MARK):
            areas = found[int(line.split()[-1])] = []
        elif head := _HEAD.match(line):
            start, end, protection, offset, name = head.groups()
            areas.append(Area(int(start, 16), int(end, 16), (protection, name), int(offset, 16)))
        elif line.startswith("VmFlags:"):
            areas[-1].flags = line.removeprefix("VmFlags:").strip()
        elif (figure := _FIGURE.match(line)) and figure[2] != "0":
            name = areas[-1].kind[1]
            chance = _CHANCE | _CHANCE_OF_FILES if name.startswith("/usr/") else _CHANCE
            if figure[1] not in chance:
                areas[-1].figures[figure[1]] = int(figure[2])
    return {pid: _joined(areas) for pid, areas in found.items()}


def _joined(areas: list[Area]) -> list[Area]:
    joined: list[Area] = []
    for area in areas:
        if joined and area.continues(joined[-1]):
            joined[-1].extend(area)
        else:
            joined.append(area)
    return joined


def resident(memory: dict[int, list[Area]]) -> int:
    """Return what a tree has resident, in KiB, pages that several have counted once."""
    return sum(area.figures.get("Pss_Dirty", 0) for areas in memory.values() for area in areas)


def differences(one: dict[int, list[Area]], other: dict[int, list[Area]]) -> list[str]:
    """Return what is only in one of them, a line each."""
    lines = []
    for pid in sorted({*one, *other}):
        left, right = ([repr(area) for area in side.get(pid, [])] for side in (one, other))
        lines += [f"{pid} - {area}" for area in left if area not in right]
        lines += [f"{pid} + {area}" for area in right if area not in left]
    return lines
