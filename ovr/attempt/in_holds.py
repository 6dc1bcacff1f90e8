"""Work on pages of the guest in holds of bounded size.

The guest may move, merge or free a page of a stopped task at any moment (compaction, khugepaged,
KSM, reclaim). So pages are looked up, judged and worked on in one hold of the VM, a bounded number
of bytes at a time; everything that can be done ahead is done ahead, with the VM running. Pages that
are not there, or not as wanted, are looked up again after the guest was asked to map them once
more.

A hold that is broken off is repeated as a whole (`ovr.vm.hold.unbroken`): pages are looked up and
worked on again. That is right for writes, too, where all of them had ended before the VM ran on:
they went to frames that were the target's own and would keep what was written, as those of any
hold that ends well, and a page of which half was written is written once more.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from ovr.attempt.targets import Part, Target
from ovr.attempt.threads import Threads
from ovr.errors import AttemptFailed
from ovr.memory.extents import (
    Extents,
    cut_out,
    first_bytes,
    left_of,
    split,
    total,
    with_flags,
)
from ovr.vm.hold import Holds, unbroken

__all__ = ["ANY_OWNER", "TRY_AGAIN_AFTER", "InHolds", "Look", "Ready", "Share", "Work"]

HOLD_BYTES: Final = 256 << 20
"""Most bytes worked on in one hold; the first one does a sixteenth of it."""
HOLD_SECONDS: Final = 0.025
"""Intended length of a hold: some 200 MiB on two cores. Stopping QEMU takes 1 ms of the 25."""
ASIDE_BYTES: Final = 64 << 20
"""Most bytes worked on in one hold if they have to be in a buffer before or after it."""
HOLD_PARTS: Final = 32
"""Most targets in one hold: each costs a page walk of its own."""

_TRIES: Final = 20
TRY_AGAIN_AFTER: Final = 0.05  # seconds; collapse and migration of a page take less

ANY_OWNER: Final = 0


class Pages(Protocol):
    """Pages that are ready for a hold; `part` says which, as a `_fastcopy.PIECE` array."""

    @property
    def part(self) -> Extents: ...


PagesT = TypeVar("PagesT", bound=Pages)


@dataclass(frozen=True)
class Ready(Generic[PagesT]):
    """Some pieces of a target, ready for a hold."""

    target: Target
    pages: PagesT


class Share(NamedTuple):
    """The runs that a thread has found in a hold, and those that it has done."""

    found: Extents
    done: Extents


Work = Callable[[Ready[PagesT], Extents], int]
"""Works on runs; returns the number of bytes done, from the first run on."""
Look = Callable[[Target, Extents], None]
"""Looks at runs. In a hold that is broken off it may be called in vain, and is called again."""


class InHolds(Generic[PagesT]):
    """Does work on pages, in holds.

    Args:
        holder: holds the VM.
        pool: runs host threads.
        threads: number of threads to use in one hold.
    """

    def __init__(self, holder: Holds, pool: Executor, threads: int) -> None:
        self.holder = holder
        self._threads = Threads(pool, threads)
        self._room = HOLD_BYTES // 16

    def _make_ready(self, target: Target, part: Extents, *, aside: bool) -> PagesT:
        """Do ahead of a hold, with the VM running, what can be done ahead.

        Args:
            target: the target.
            part: pieces of it.
            aside: they did not get anywhere in the last hold: use a buffer in any case.
        """
        raise NotImplementedError

    def _after_hold(self, done: Sequence[tuple[Ready[PagesT], Extents]]) -> None:
        """Do after a hold what may block, with the runs that were done in it."""

    def _prepare(self, batch: Sequence[Part], *, aside: bool = False) -> list[list[Ready[PagesT]]]:
        # Work for the running VM: divide parts among threads, take the host's page faults.
        return [
            self._threads.on_parts(part, partial(self._ready, target, aside=aside))
            for target, part in batch
        ]

    def _ready(self, target: Target, part: Extents, *, aside: bool) -> Ready[PagesT]:
        pages = self._make_ready(target, part, aside=aside)
        target.space.ram.prefault(target.space.walk(part))
        return Ready(target, pages)

    def _batches(self, parts: Iterable[Part]) -> Iterator[list[Part]]:
        # The parts for one hold each, as large as the holds before have shown to be right.
        batch: list[tuple[Target, list[Extents]]] = []
        room = self._room
        for target, pieces in parts:
            most = HOLD_BYTES if target.source.nowait else ASIDE_BYTES
            room = min(room, most)
            for grain in split(pieces, HOLD_BYTES // 16):
                fits = total(grain) <= room
                if batch and batch[-1][0] is target and fits:
                    batch[-1][1].append(grain)
                else:
                    if batch and not (fits and len(batch) < HOLD_PARTS):
                        yield [(one, np.concatenate(grains)) for one, grains in batch]
                        batch, room = [], min(self._room, most)
                    batch.append((target, [grain]))
                room -= total(grain)
        if batch:
            yield [(one, np.concatenate(grains)) for one, grains in batch]

    def _learn(self, size: int, seconds: float) -> None:
        # The size of the next hold: at most twice that of this one.
        if size:
            fitting = int(size * min(HOLD_SECONDS / seconds, 2.0))
            self._room = min(max(fitting, HOLD_BYTES // 16), HOLD_BYTES)

    def _each_run(
        self,
        batch: Sequence[Part],
        work: Work[PagesT],
        wanted: int,
        then: Look | None = None,
        *,
        after: Look | None = None,
        again: bool = True,
        writes: bool = False,
    ) -> None:
        # Do `work` on every run of the parts, by several threads, in the hold in which the run was
        # found with the wanted flags; in that hold, do `then` on all runs of a part. `after` is
        # called when the hold has ended: nothing that may block is done in a hold. Unless `again`,
        # pages that are not found as wanted are left out. `writes`: to guest RAM.
        left = list(batch)
        tries = 0
        stuck = False
        while left:
            ready = self._prepare(left, aside=stuck)
            shares = self._held(ready, work, wanted, then, writes=writes)
            whole = [_joined(one) for one in shares]
            done = sum(total(share.done) for share in whole)
            self._after_hold(
                [
                    (one, share.done)
                    for part, theirs in zip(ready, shares, strict=True)
                    for one, share in zip(part, theirs, strict=True)
                ]
            )
            if after:
                for (target, _), share in zip(left, whole, strict=True):
                    after(target, share.done)
            missed = [
                (target, rest)
                for (target, part), share in zip(left, whole, strict=True)
                if len(rest := left_of(part, share.found))
            ]
            left = [
                (target, rest)
                for (target, part), share in zip(left, whole, strict=True)
                if len(rest := left_of(part, share.done))
            ]
            stuck = not (done or missed)
            if missed and not again:
                left = _without(left, missed)
            elif missed:
                tries += 1
                self._ask_again(missed, tries, wanted)

    def _held(
        self,
        ready: Sequence[Sequence[Ready[PagesT]]],
        work: Work[PagesT],
        wanted: int,
        then: Look | None,
        *,
        writes: bool = False,
    ) -> list[list[Share]]:
        # One hold; its work counts if it ends without an error.
        def in_hold() -> tuple[list[list[Share]], float]:
            shares = []
            start = time.perf_counter()
            # The process may be dead, and its top page table in use by another process, whose
            # pages are exclusive as well.
            for check in {one.target.check for part in ready for one in part}:
                check()
            for part in ready:
                shares.append(self._threads.on_each(part, partial(_find_and_do, work, wanted)))
                if then and part:
                    then(part[0].target, _joined(shares[-1]).done)
            return shares, time.perf_counter() - start

        shares, seconds = unbroken(self.holder, in_hold, writes=writes)
        self._learn(sum(total(share.done) for part in shares for share in part), seconds)
        return shares

    def _ask_again(self, missed: Sequence[Part], tries: int, wanted: int) -> None:
        if tries == _TRIES:
            target, part = missed[0]
            never = "became exclusively owned" if wanted else "were in memory when looked at"
            raise AttemptFailed(
                f"{target.name}: {total(part)} bytes at {int(part['gva'][0]):#x} and above never"
                f" {never} ({tries} tries)",
                "the guest may be out of memory; free some and try again",
            )
        time.sleep(TRY_AGAIN_AFTER)
        for target, part in missed:
            target.ask(part)


def _find_and_do(work: Work[PagesT], wanted: int, ready: Ready[PagesT]) -> Share:
    # Each thread walks its own part: scattered pages give as many runs as pages, and passing them
    # between threads takes as long as walking.
    target = ready.target
    walked = target.space.walk(ready.pages.part, target.frames if wanted else None)
    runs = with_flags(walked, wanted)
    cut = cut_out(runs, target.spared)
    did = work(ready, cut)
    return Share(runs, runs if did == total(cut) else first_bytes(runs, cut, did))


def _without(parts: Sequence[Part], others: Sequence[Part]) -> list[Part]:
    # Each target is in each of them at most once.
    cut = {id(target): pieces for target, pieces in others}
    left = [
        (target, left_of(pieces, cut[id(target)]) if id(target) in cut else pieces)
        for target, pieces in parts
    ]
    return [(target, pieces) for target, pieces in left if len(pieces)]


def _joined(shares: Sequence[Share]) -> Share:
    return Share(
        np.concatenate([share.found for share in shares]),
        np.concatenate([share.done for share in shares]),
    )
