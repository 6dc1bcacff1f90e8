"""Copy pages from the images into the frames that the guest has allocated for them.

The guest may move, merge or free a page of a stopped task at any moment (compaction, khugepaged,
KSM, reclaim). So pages are looked up, judged and written in one hold of the VM, a bounded number
of bytes at a time; everything that can be done ahead is done ahead, with the VM running. A page is
written only while the guest kernel marks it as owned: anonymous and exclusive to one process
(``PG_anon_exclusive``, Linux kernel commit 6c287605fd56 ("mm: remember exclusively mapped anonymous
pages with PG_anon_exclusive") (in v5.19)), or in its place in the page cache of the shared object
that it belongs to; and while reclaim will keep what is written (`ovr.memory.paging.Frames`). Other
pages are looked up again after the guest was asked to map them once more.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from ovr._fastcopy import OWNED
from ovr.attempt.feed import Feed
from ovr.attempt.journal import Journal
from ovr.attempt.targets import Family, Part, Target
from ovr.attempt.threads import Threads
from ovr.errors import RestoreFailed, VerifyMismatch
from ovr.memory.extents import (
    Extents,
    as_pieces,
    cut_out,
    cut_to,
    ends_of,
    first_bytes,
    left_of,
    on_same_frames,
    sample,
    split,
    total,
    with_flags,
)
from ovr.vm.hold import Holder

__all__ = ["VERIFY_MODES", "Copier"]

log = logging.getLogger("ovr.journal")

HOLD_BYTES: Final = 256 << 20
"""Most bytes copied in one hold; the first one copies a sixteenth of it."""
HOLD_SECONDS: Final = 0.025
"""Intended length of a hold: some 200 MiB on two cores. Stopping QEMU takes 1 ms of the 25."""
ASIDE_BYTES: Final = 64 << 20
"""Most bytes copied in one hold from images that must be read into a buffer before."""
HOLD_PARTS: Final = 32
"""Most targets in one hold: each costs a page walk of its own."""

_TRIES: Final = 20
_TRY_AGAIN_AFTER: Final = 0.05  # seconds; collapse and migration of a page take less
_TRIES_TO_SHARE: Final = 4
_SAMPLE_PAGES: Final = 4096
_VERIFIED_PAGES: Final = {"none": 0, "sample": _SAMPLE_PAGES, "full": None}
VERIFY_MODES: Final = tuple(_VERIFIED_PAGES)

ANY_OWNER: Final = 0


class _Unlike(NamedTuple):
    """Pieces for which a descendant has other frames than the first task of its family."""

    first: Target
    descendant: Target
    pieces: Extents


@dataclass(frozen=True)
class Ready:
    """Some pieces of a target, ready for a hold."""

    target: Target
    feed: Feed


class _Share(NamedTuple):
    """The runs that a thread has found in a hold, and those that it has done."""

    found: Extents
    done: Extents


Work = Callable[[Ready, Extents], int]
"""Works on runs; returns the number of bytes done, from the first run on."""
Look = Callable[[Target, Extents], None]


class Copier:
    """Copies and compares memory.

    Args:
        holder: holds the VM.
        pool: runs host threads for the copy.
        threads: number of threads to use in one hold.
        journal: gets the writes.
        advance: called with the size of every write in bytes.
    """

    def __init__(
        self,
        holder: Holder,
        pool: Executor,
        threads: int,
        journal: Journal,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.holder = holder
        self.journal = journal
        self._threads = Threads(pool, threads)
        self._advance = advance
        self._room = HOLD_BYTES // 16

    def copy(self, families: Iterable[Family], targets: Iterable[Target]) -> None:
        """Write pages shared by fork, then all others.

        Raises:
            RestoreFailed, ImagesDamaged, GuestFault: as `write_families` and `write`.
        """
        no_longer_shared = self.write_families(families)
        self.write([*no_longer_shared, *((target, target.pieces) for target in targets)])
        for write in self.journal.memory:
            log.info("%s", write)

    def write(self, parts: Sequence[Part]) -> None:
        """Write pieces of targets.

        Raises:
            RestoreFailed: some pages are not there, or not the target's own, and stay so.
            ImagesDamaged: a pages image cannot be read.
            GuestFault: page tables of the guest are damaged.
        """
        for batch in self._batches(parts):
            self._each_run(batch, self._copy, OWNED, after=self._note)

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

    def _prepare(self, batch: Sequence[Part], *, aside: bool = False) -> list[list[Ready]]:
        # Work for the running VM: divide parts among threads, read ahead.
        return [
            self._threads.on_parts(part, partial(_make_ready, target, aside=aside))
            for target, part in batch
        ]

    def write_families(self, families: Iterable[Family]) -> list[Part]:
        """Write pages shared by fork; return those that turn out not to be shared.

        Raises:
            RestoreFailed: as `write`; or a task would see pages that it has not inherited.
            ImagesDamaged, GuestFault: as `write`.
        """
        unlike: list[_Unlike] = []
        for family in families:
            for batch in self._batches([(family.first, family.first.pieces)]):
                kin = partial(self._look_at_kin, family, unlike)
                self._each_run(batch, self._copy, OWNED, kin, after=self._note)
        return self._not_shared(unlike)

    def _look_at_kin(
        self, family: Family, unlike: list[_Unlike], target: Target, runs: Extents
    ) -> None:
        # All pages of a hold at once: there may be a hundred page tables to walk.
        for space, ranges in family.excluded:
            near = cut_to(runs, ranges["start"], ranges["end"])
            if len(on_same_frames(space.walk(as_pieces(near)), near)):
                raise RestoreFailed(
                    f"{target.name}: a descendant has inherited pages that it should not have",
                    "report it, with the images",
                )
        for descendant in family.descendants:
            pieces = cut_to(descendant.pieces, runs["gva"], ends_of(runs))
            same = on_same_frames(descendant.space.walk(pieces), runs)
            if len(rest := left_of(pieces, same)):
                unlike.append(_Unlike(target, descendant, rest))

    def _not_shared(self, unlike: Sequence[_Unlike]) -> list[Part]:
        # Pages that a descendant still has on other frames than the first task. While the guest
        # moves a shared page, its page tables are changed one after the other, and the content
        # moves along; a page of its own would have the right content, but not be shared.
        left: list[Part] = []
        for _ in range(_TRIES_TO_SHARE):
            if not unlike:
                break
            time.sleep(_TRY_AGAIN_AFTER)
            absent: list[_Unlike] = []
            with self.holder.held():
                for check in {
                    one.check for pair in unlike for one in (pair.first, pair.descendant)
                }:
                    check()
                for first, descendant, pieces in unlike:
                    theirs = first.space.walk(pieces)
                    there = cut_to(descendant.space.walk(pieces), theirs["gva"], ends_of(theirs))
                    same = on_same_frames(there, theirs)
                    if len(other := left_of(as_pieces(there), same)):
                        left.append((descendant, other))
                    if len(gone := left_of(pieces, there)):
                        absent.append(_Unlike(first, descendant, gone))
            unlike = absent
        return left + [(descendant, pieces) for _, descendant, pieces in unlike]

    def verify(self, targets: Sequence[Target], mode: str) -> int:
        """Compare pieces with their source; return the bytes compared.

        Args:
            targets: all targets, each once.
            mode: one of `VERIFY_MODES`: none of the pages, a sample, or all.

        Raises:
            VerifyMismatch: a page is not what was written.
            RestoreFailed: as `write`.
        """
        pages = _VERIFIED_PAGES[mode]
        if pages == 0:
            return 0
        parts = [
            (target, target.pieces if pages is None else sample(target.pieces, pages))
            for target in targets
        ]
        for batch in self._batches(parts):
            self._each_run(batch, self._compare, ANY_OWNER)
        return sum(total(part) for _, part in parts)

    def _each_run(
        self,
        batch: Sequence[Part],
        work: Work,
        wanted: int,
        then: Look | None = None,
        after: Look | None = None,
    ) -> None:
        # Do `work` on every run of the parts, by several threads, in the hold in which the run was
        # found with the wanted flags; in that hold, do `then` on all runs of a part. `after` is
        # called when the hold has ended: nothing that may block is done in a hold.
        left = list(batch)
        tries = 0
        stuck = False
        while left:
            ready = self._prepare(left, aside=stuck)
            shares = self._held(ready, work, wanted, then)
            whole = [_joined(one) for one in shares]
            done = sum(total(share.done) for share in whole)
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
            if missed:
                tries += 1
                self._ask_again(missed, tries)

    def _held(
        self, ready: Sequence[Sequence[Ready]], work: Work, wanted: int, then: Look | None
    ) -> list[list[_Share]]:
        # One hold; its work counts if it ends without an error.
        shares = []
        with self.holder.held():
            start = time.perf_counter()
            # The process may be dead, and its top page table in use by another process, whose
            # pages are exclusive as well.
            for check in {one.target.check for part in ready for one in part}:
                check()
            for part in ready:
                shares.append(self._threads.on_each(part, partial(_find_and_do, work, wanted)))
                if then and part:
                    then(part[0].target, _joined(shares[-1]).done)
            seconds = time.perf_counter() - start
        self._learn(sum(total(share.done) for part in shares for share in part), seconds)
        return shares

    def _ask_again(self, missed: Sequence[Part], tries: int) -> None:
        if tries == _TRIES:
            target, part = missed[0]
            raise RestoreFailed(
                f"{target.name}: {total(part)} bytes at {int(part['gva'][0]):#x} and above never"
                f" became exclusively owned ({tries} tries)",
                "the guest may be out of memory; free some and restore again",
            )
        time.sleep(_TRY_AGAIN_AFTER)
        for target, part in missed:
            target.ask(part)

    def _copy(self, ready: Ready, runs: Extents) -> int:
        # SAFETY: the guest kernel's flags, read in this hold, say that the frames are the target's
        # own: a task's exclusive anonymous pages, anonymous pages that only tasks of the tree can
        # have, or pages of a shared object that only the tree has. The hold keeps them still: no
        # vCPU runs until it ends, and the tasks themselves are stopped under CRIU until we commit;
        # and once it has ended the gate lets no write through. The content stays: the frame is
        # dirty, or swap has no copy that reclaim could go back to. Undone by killing the tree.
        return ready.feed.copy(ready.target.space.ram, runs)

    def _compare(self, ready: Ready, runs: Extents) -> int:
        compared, gva = ready.feed.compare(ready.target.space.ram, runs)
        if gva is not None:
            raise VerifyMismatch(
                f"{ready.target.name}: the page at {gva:#x} is not what was written",
                "restore again; if it happens again, report it with the guest's kernel log",
            )
        return compared

    def _note(self, target: Target, runs: Extents) -> None:
        self.journal.add_memory(target.name, runs)
        self._advance(total(runs))


def _make_ready(target: Target, part: Extents, *, aside: bool) -> Ready:
    # With the VM running: take the host's page faults, and read the source, which may fail.
    feed = Feed.make(target.source, part, aside=aside)
    target.space.ram.prefault(target.space.walk(part))
    return Ready(target, feed)


def _find_and_do(work: Work, wanted: int, ready: Ready) -> _Share:
    # Each thread walks its own part: scattered pages give as many runs as pages, and passing them
    # between threads takes as long as walking.
    target = ready.target
    walked = target.space.walk(ready.feed.part, target.frames if wanted else None)
    runs = with_flags(walked, wanted)
    cut = cut_out(runs, target.spared)
    did = work(ready, cut)
    return _Share(runs, runs if did == total(cut) else first_bytes(runs, cut, did))


def _joined(shares: Sequence[_Share]) -> _Share:
    return _Share(
        np.concatenate([share.found for share in shares]),
        np.concatenate([share.done for share in shares]),
    )
