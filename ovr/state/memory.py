"""The memory of a task: pages from its image into the frames that the guest gave it.

The guest may move, merge or free a page of a stopped task at any moment (compaction, khugepaged,
KSM, reclaim). So pages are looked up, judged and written in one hold of the VM, a bounded number
of bytes at a time; everything that can be done ahead is done ahead, with the VM running. A page is
written only while the guest kernel says that it is anonymous and this process's alone
(``PG_anon_exclusive``, Linux kernel commit 6c287605fd56 ("mm: remember exclusively mapped anonymous
pages with PG_anon_exclusive") (in v5.19)). Pages that are not are looked up again a little later.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from ovr._fastcopy import EXCLUSIVE, PIECE, populate_read
from ovr.errors import ImagesDamaged, RestoreFailed, VerifyMismatch
from ovr.paging import AddressSpace, Frames
from ovr.ram import Runs
from ovr.ranges import split, total
from ovr.vm.hold import Holder

__all__ = ["Copier", "TaskMemory"]

HOLD_BYTES: Final = 64 << 20
"""How much is copied in one hold: some 6 ms of a host core; to stop QEMU takes one."""

_TRIES: Final = 20
_TRY_AGAIN_AFTER: Final = 0.05  # seconds; collapse and migration of a page take less
_SAMPLE_PAGES: Final = 4096

T = TypeVar("T")


@dataclass(frozen=True)
class TaskMemory:
    """The outside part of one task's memory.

    Attributes:
        pid: the task's pid in the images.
        space: the task's address space in the guest.
        pieces: a `_fastcopy.PIECE` array; offsets are positions in `source`.
        source: the pages image.
        source_name: what messages call it.
    """

    pid: int
    space: AddressSpace
    pieces: Runs
    source: memoryview
    source_name: str


class Copier:
    """Copies and compares the memory of tasks.

    Args:
        holder: keeps the VM still.
        frames: where the guest keeps its ``struct page`` array.
        pool: host threads for the copy.
        threads: how many of them to use for one hold.
    """

    def __init__(self, holder: Holder, frames: Frames, pool: Executor, threads: int) -> None:
        self.holder = holder
        self._frames = frames
        self._pool = pool
        self._threads = threads

    def write(self, memory: TaskMemory) -> int:
        """Write all pieces; return the number of bytes.

        Raises:
            RestoreFailed: some pages are not there, or not the task's own, and stay so.
            ImagesDamaged: the pages image cannot be read.
            GuestFault: the task's page tables are damaged.
        """
        for part in split(memory.pieces, HOLD_BYTES):
            _read_ahead(memory, part)
            memory.space.ram.prefault(memory.space.walk(part))
            self._each_exclusive_run(memory, part, self._copy)
        return total(memory.pieces)

    def verify(self, memory: TaskMemory, *, full: bool) -> int:
        """Compare pieces with their source, all or a sample; return the bytes compared.

        Raises:
            VerifyMismatch: a page is not what was written.
            RestoreFailed: as `write`.
        """
        pieces = memory.pieces if full else _sample(memory.pieces)
        for part in split(pieces, HOLD_BYTES):
            self._each_exclusive_run(memory, part, self._compare)
        return total(pieces)

    def _each_exclusive_run(
        self, memory: TaskMemory, part: Runs, work: Callable[[TaskMemory, Runs], None]
    ) -> None:
        # Do `work` on every run of `part`, each in the hold in which it was found exclusive.
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_TRY_AGAIN_AFTER)
            with self.holder.held():
                runs = memory.space.walk(part, self._frames)
                ours = runs[(runs["flags"] & EXCLUSIVE) != 0]
                work(memory, ours)
            part = _without(part, ours)
            if not len(part):
                return
        missing = total(part)
        raise RestoreFailed(
            f"pid {memory.pid}: {missing} bytes from {int(part['gva'][0]):#x} on do not become the"
            " task's own pages",
            "the guest may be out of memory; free some and restore again",
        )

    def _copy(self, memory: TaskMemory, runs: Runs) -> None:
        # SAFETY: the frames are the task's own: anonymous and exclusive by the guest kernel's own
        # word, found in this very hold. The hold keeps them still: no vCPU runs until it ends, and
        # the task itself is stopped under CRIU until we commit. Undone by killing the task.
        self._in_parallel(runs, lambda share: memory.space.ram.copy_in(share, memory.source))

    def _compare(self, memory: TaskMemory, runs: Runs) -> None:
        ram = memory.space.ram
        differences = self._in_parallel(
            runs, lambda share: ram.first_difference(share, memory.source)
        )
        for gva in differences:
            if gva is not None:
                raise VerifyMismatch(
                    f"pid {memory.pid}: the page at {gva:#x} is not what was written",
                    "restore again; if it happens again, report it with the guest's kernel log",
                )

    def _in_parallel(self, runs: Runs, work: Callable[[Runs], T]) -> list[T]:
        share = -(-total(runs) // self._threads)
        return list(self._pool.map(work, split(runs, max(share, 1 << 20))))


def _read_ahead(memory: TaskMemory, part: Runs) -> None:
    # Fault the source in, and find out here, not in a hold, that it cannot be read.
    try:
        for start, end in _file_ranges(part):
            populate_read(memory.source[start:end])
    except OSError as error:
        raise ImagesDamaged(
            f"{memory.source_name}: cannot be read: {error.strerror}", "dump again"
        ) from error


def _file_ranges(part: Runs) -> Iterator[tuple[int, int]]:
    # The source ranges of `part`, neighbours joined: pages images are read in order.
    starts = part["offset"]
    ends = starts + part["size"].astype("<i8")
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    firsts = np.concatenate([[0], breaks])
    lasts = np.concatenate([breaks - 1, [len(part) - 1]])
    yield from zip(starts[firsts].tolist(), ends[lasts].tolist(), strict=True)


def _without(part: Runs, done: Runs) -> Runs:
    # What is left of the sorted ranges `part` after the sorted runs `done` inside of them.
    if total(part) == total(done):
        return part[:0]
    left = []
    ranges = iter(done[["gva", "size"]].tolist())
    gva, size = next(ranges, (1 << 64, 0))
    for start, length, offset in part.tolist():
        at = start
        while gva < start + length:
            if at < gva:
                left.append((at, gva - at, offset + at - start))
            at = gva + size
            gva, size = next(ranges, (1 << 64, 0))
        if at < start + length:
            left.append((at, start + length - at, offset + at - start))
    return np.array(left, dtype=PIECE)


def _sample(ranges: Runs) -> Runs:
    # Pages spread evenly over all bytes, the first and the last among them.
    pages = total(ranges) >> 12
    if pages <= _SAMPLE_PAGES:
        return ranges
    chosen = np.unique(np.linspace(0, pages - 1, _SAMPLE_PAGES).astype("<u8"))
    ends = np.cumsum(ranges["size"] >> np.uint64(12))
    owner = np.searchsorted(ends, chosen, side="right")
    inside = (chosen - (ends[owner] - (ranges["size"][owner] >> np.uint64(12)))) << np.uint64(12)
    sample = np.empty(len(chosen), dtype=PIECE)
    sample["gva"] = ranges["gva"][owner] + inside
    sample["size"] = 4096
    sample["offset"] = ranges["offset"][owner] + inside.astype("<i8")
    return sample
