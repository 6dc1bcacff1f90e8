"""What the kernel says of the memory of a tree: /proc/PID/smaps, without what is chance."""

import re
from collections.abc import Iterable

from ovr import lab

_HEAD = re.compile(r"^([0-9a-f]+-[0-9a-f]+) (\S+) ([0-9a-f]+) \S+ \d+ *(.*)$")
_CHANCE = {"Referenced"}  # who looked at a page last
_MARK = "== "

Area = tuple[str, ...]
"""Bounds, protection, offset and name; then a line for each figure that is not zero."""


def memory_of(vm: lab.LabVm, pids: Iterable[int]) -> dict[int, list[Area]]:
    """Return the areas of each process, by its pid in its own namespace."""
    numbers = " ".join(map(str, pids))
    show = f"echo '{_MARK}'$(grep NSpid /proc/$p/status); cat /proc/$p/smaps"
    command = f"for p in {numbers}; do {show}; done"
    found: dict[int, list[Area]] = {}
    areas: list[Area] = []
    for line in vm.sh(command, timeout=240).stdout.decode().splitlines():
        if line.startswith(_MARK):
            areas = found[int(line.split()[-1])] = []
        elif head := _HEAD.match(line):
            areas.append(head.groups())
        elif not line.endswith(" 0 kB") and line.split(":")[0] not in _CHANCE:
            areas[-1] += (" ".join(line.split()),)
    return found


def differences(one: dict[int, list[Area]], other: dict[int, list[Area]]) -> list[str]:
    """Return what is only in one of them, in lines."""
    lines = []
    for pid in sorted({*one, *other}):
        left, right = one.get(pid, []), other.get(pid, [])
        lines += [f"{pid} - {area}" for area in left if area not in right]
        lines += [f"{pid} + {area}" for area in right if area not in left]
    return lines
