"""Two image sets of the same tree, which stood still: message for message, page for page.

The messages are compared without their schemas, so that nothing is left out that `ovr` does not
read. What no two dumps have in common is in `CHANCE`.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovr.errors import ImagesDamaged
from ovr.images import ImageSet, Memory, Task
from ovr.images.framing import frames, is_raw, kind_of
from ovr.images.vma import VMA_ANON_PRIVATE
from ovr.memory.addresses import PAGE_SIZE

__all__ = ["differences"]

CHANCE: Final = {
    ("inventory", (8,)): "dump_uptime",
    ("inventory", (13,)): "dump_criu_run_id",
    ("timens", (1, 1)): "CLOCK_MONOTONIC at the dump",
    ("timens", (1, 2)): "its nanoseconds",
    ("timens", (2, 1)): "CLOCK_BOOTTIME at the dump",
    ("timens", (2, 2)): "its nanoseconds",
}
"""Fields that no two dumps have in common, by type of image and field numbers from the outside."""
_THREADS: Final = (5,)  # of a PstreeEntry; garbage for dead tasks
_OF_PAGES: Final = {"pagemap", "pagemap-shmem", "pages", "pages-shmem"}
_MOST: Final = 12  # differences shown of one pagemap

Fields = Mapping[int, list[int | bytes]]


def differences(one: Path, other: Path) -> list[str]:
    """Return how the images in two directories differ, a line each.

    The layout of pagemaps and pages images does not count, nor what the kernel writes to a
    registered ``struct rseq``. A page that only one of them has does not count either if it is all
    zeros, in private anonymous memory.

    Raises:
        OvrError: invalid images.
    """
    with ImageSet.open(one) as left, ImageSet.open(other) as right:
        lines = [f"only in one of them: {name}" for name in sorted({*left.names} ^ {*right.names})]
        dead = {number for number, task in enumerate(left.tasks) if not task.alive}
        for name in sorted({*left.names} & {*right.names}):
            if kind_of(name) not in _OF_PAGES:
                both = left.read(name), right.read(name)
                lines += _of_messages(name, *both, dead if name == "pstree.img" else set())
        tasks = {task.pid: task for task in right.tasks}
        for task in left.tasks:
            twin = tasks.get(task.pid)
            if twin and task.memory and twin.memory:
                lines += _of_pages(task.memory, twin.memory, task)
        for shmid in {*left.shared} & {*right.shared}:
            lines += _of_pages(left.shared[shmid], right.shared[shmid])
        return lines


# ---------------------------------------------------------------------------------------- messages


def _of_messages(name: str, left: bytes, right: bytes, dead: Set[int]) -> list[str]:
    if left == right:
        return []
    kind = kind_of(name)
    pairs = None
    if not is_raw(name):
        # Entries with raw bytes behind them cannot be told apart: compared as a whole.
        with suppress(ImagesDamaged):
            pairs = [[frame.payload for frame in frames(data, name)] for data in (left, right)]
    if pairs is None:
        return [f"{name}: {len(left)} and {len(right)} bytes, not the same"]
    mine, theirs = pairs
    if len(mine) != len(theirs):
        return [f"{name}: {len(mine)} and {len(theirs)} entries"]
    return [
        f"{name}[{number}] {'.'.join(map(str, at))}: {what}"
        for number, both in enumerate(zip(mine, theirs, strict=True))
        for at, what in _unlike(*both)
        if (kind, at) not in CHANCE and not (number in dead and at == _THREADS)
    ]


def _unlike(
    left: bytes, right: bytes, at: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], str]]:
    if left == right:
        return
    mine, theirs = _fields(left), _fields(right)
    if mine is None or theirs is None:
        yield at, f"{left[:40].hex()} != {right[:40].hex()}"
    else:
        yield from _unlike_fields(mine, theirs, at)


def _unlike_fields(
    mine: Fields, theirs: Fields, at: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], str]]:
    for number in sorted({*mine, *theirs}):
        values, others = mine.get(number, []), theirs.get(number, [])
        if len(values) != len(others):
            yield (*at, number), f"{len(values)} and {len(others)} values"
            continue
        for value, another in zip(values, others, strict=True):
            if isinstance(value, bytes) and isinstance(another, bytes):
                yield from _unlike(value, another, (*at, number))
            elif value != another:
                yield (*at, number), f"{value!r} != {another!r}"


def _fields(data: bytes) -> Fields | None:
    """Return the values of a protobuf message by field number; None if it cannot be one."""
    found: dict[int, list[int | bytes]] = {}
    at = 0
    try:
        while at < len(data):
            key, at = _varint(data, at)
            number, kind = key >> 3, key & 7
            value: int | bytes
            if kind == 0:
                value, at = _varint(data, at)
            else:
                size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
                value, at = data[at : at + size], at + size
            if not number or at > len(data):
                return None
            found.setdefault(number, []).append(value)
    except (IndexError, KeyError):
        return None
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError(at)


# ------------------------------------------------------------------------------------------- pages


class _Pages(NamedTuple):
    """Ascending addresses, and a row of bytes for each page."""

    gva: NDArray[np.uint64]
    content: NDArray[np.uint8]


def _of_pages(mine: Memory, theirs: Memory, task: Task | None = None) -> list[str]:
    one, other = _pages(mine), _pages(theirs)
    _, left, right = np.intersect1d(one.gva, other.gva, return_indices=True)
    unlike = one.content[left] != other.content[right]
    for start, end in task.rseq_areas.tolist() if task else ():
        first = start % PAGE_SIZE
        unlike[one.gva[left] == start - first, first : first + end - start] = False
    rows = np.flatnonzero(unlike.any(axis=1))
    lines = [
        f"{mine.name}: {one.gva[at]:#x} {_what(unlike[row], one.content[at], other.content[twin])}"
        for row, at, twin in zip(rows, left[rows], right[rows], strict=True)
    ]
    anonymous = _anonymous(task)
    for side, pages, common in (("first", one, left), ("second", other, right)):
        alone = np.setdiff1d(np.arange(len(pages.gva)), common)
        lines += [
            f"{mine.name}: {gva:#x} only in the {side}" + ("" if content.any() else ", all zeros")
            for gva, content in zip(pages.gva[alone].tolist(), pages.content[alone], strict=True)
            if content.any() or not anonymous(gva)
        ]
    rest = len(lines) - _MOST
    return lines if rest <= 0 else [*lines[:_MOST], f"{mine.name}: {rest} more pages"]


def _pages(memory: Memory) -> _Pages:
    entries = memory.entries
    runs = [
        np.arange(start, start + size, PAGE_SIZE, dtype=np.uint64)
        for start, size in zip(entries["gva"].tolist(), entries["size"].tolist(), strict=True)
    ]
    gva = np.concatenate([np.empty(0, np.uint64), *runs])
    file = memory.file()
    assert file.size == gva.size * PAGE_SIZE, f"{memory.pages_name}: {file.size} bytes"
    content = np.frombuffer(file.read(0, file.size), np.uint8)
    return _Pages(gva, content.reshape(gva.size, PAGE_SIZE))


def _anonymous(task: Task | None) -> Callable[[int], bool]:
    """Return whether an address is in private anonymous memory of the task."""
    if task is None or task.vmas is None:
        return lambda gva: False
    chosen = task.vmas[task.vmas["status"] & VMA_ANON_PRIVATE != 0]
    areas = [*zip(chosen["start"].tolist(), chosen["end"].tolist(), strict=True)]
    return lambda gva: any(start <= gva < end for start, end in areas)


def _what(unlike: NDArray[np.bool_], left: NDArray[np.uint8], right: NDArray[np.uint8]) -> str:
    at = np.flatnonzero(unlike)
    start, end = int(at[0]), int(at[-1]) + 1
    shown = slice(start, min(end, start + 16))
    return f"+{start:#x}..{end:#x}: {left[shown].tobytes().hex()} != {right[shown].tobytes().hex()}"
