"""Copy pages from the images into the frames that the guest has allocated for them.

Pages are looked up, judged and written in one hold of the VM (`in_holds`). A page is written only
while the guest kernel marks it as owned: anonymous and exclusive to one process
(``PG_anon_exclusive``, Linux kernel commit 6c287605fd56 ("mm: remember exclusively mapped anonymous
pages with PG_anon_exclusive") (in v5.19)), or in its place in the page cache of the shared object
that it belongs to; and while reclaim will keep what is written (`ovr.memory.paging.Frames`). Other
pages are looked up again after the guest was asked to map them once more.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Final, NamedTuple

from ovr._fastcopy import OWNED
from ovr.attempt.feed import Feed
from ovr.attempt.in_holds import ANY_OWNER, TRY_AGAIN_AFTER, InHolds, Ready
from ovr.attempt.journal import Journal
from ovr.attempt.origin import Lane, Origin
from ovr.attempt.targets import Family, Part, Target
from ovr.errors import AttemptFailed, VerifyMismatch
from ovr.images.source import Source
from ovr.memory.extents import (
    Extents,
    as_pieces,
    cut_to,
    ends_of,
    left_of,
    on_same_frames,
    sample,
    total,
)
from ovr.vm.hold import BothHeld, Holder, unbroken

__all__ = ["VERIFY_MODES", "Copier"]

log = logging.getLogger("ovr.journal")

_TRIES_TO_SHARE: Final = 4
_SAMPLE_PAGES: Final = 4096
_VERIFIED_PAGES: Final = {"none": 0, "sample": _SAMPLE_PAGES, "full": None}
VERIFY_MODES: Final = tuple(_VERIFIED_PAGES)


class _Unlike(NamedTuple):
    """Pieces for which a descendant has other frames than the first task of its family."""

    first: Target
    descendant: Target
    pieces: Extents


class Copier(InHolds[Feed | Lane]):
    """Copies and compares memory.

    Args:
        holder: holds the VM.
        pool: runs host threads for the copy.
        threads: number of threads to use in one hold.
        journal: gets the writes.
        advance: called with the size of every write in bytes.
        origin: holds the VM that pages come from, if that is another one.
    """

    def __init__(
        self,
        holder: Holder,
        pool: Executor,
        threads: int,
        journal: Journal,
        advance: Callable[[int], None] = lambda count: None,
        *,
        origin: Holder | None = None,
    ) -> None:
        super().__init__(holder if origin is None else BothHeld(origin, holder), pool, threads)
        self.journal = journal
        self._advance = advance
        self._saved: Callable[[Extents], None] = lambda copied: None

    def _make_ready(self, target: Target, part: Extents, *, aside: bool) -> Feed | Lane:
        # Read the source, which may fail.
        if isinstance(target.source, Origin):
            return Lane.make(target.source, part, aside=aside)
        assert isinstance(target.source, Source)
        return Feed.make(target.source, part, aside=aside)

    def copy(self, families: Iterable[Family], targets: Iterable[Target]) -> None:
        """Write pages shared by fork, then all others.

        Raises:
            AttemptFailed, ImagesDamaged, GuestFault: as `write_families` and `write`.
        """
        no_longer_shared = self.write_families(families)
        self.write([*no_longer_shared, *((target, target.pieces) for target in targets)])
        for write in self.journal.memory:
            log.info("%s", write)

    def write(self, parts: Sequence[Part]) -> None:
        """Write pieces of targets.

        Raises:
            AttemptFailed: some pages are not there, or not the target's own, and stay so.
            ImagesDamaged: a pages image cannot be read.
            GuestFault: page tables of the guest are damaged.
        """
        for batch in self._batches(parts):
            self._each_run(batch, self._copy, OWNED, after=self._note, writes=True)

    def copy_own(self, target: Target, saved: Callable[[Extents], None]) -> None:
        """Write the pages of a running process of another VM, but for those that are not its own.

        Args:
            target: the pages; its source is an `Origin` with frames.
            saved: called after each hold with the runs of the origin that were copied in it.

        Raises:
            AttemptFailed: a process has died.
            GuestFault: page tables of a guest are damaged.
        """
        self._saved = saved
        for batch in self._batches([(target, target.pieces)]):
            self._each_run(batch, self._copy, OWNED, after=self._note, again=False, writes=True)

    def _after_hold(self, done: Sequence[tuple[Ready[Feed | Lane], Extents]]) -> None:
        for ready, _ in done:
            if isinstance(ready.pages, Lane) and ready.pages.origin.frames is not None:
                self._saved(ready.pages.copied)

    def write_families(self, families: Iterable[Family]) -> list[Part]:
        """Write pages shared by fork; return those that turn out not to be shared.

        Raises:
            AttemptFailed: as `write`; or a task would see pages that it has not inherited.
            ImagesDamaged, GuestFault: as `write`.
        """
        unlike: list[_Unlike] = []
        for family in families:
            self._write_family(family, unlike)
        return self._not_shared(unlike)

    def _write_family(self, family: Family, unlike: list[_Unlike]) -> None:
        seen: list[_Unlike] = []

        def look(target: Target, runs: Extents) -> None:
            seen[:] = self._look_at_kin(family, target, runs)

        def after(target: Target, runs: Extents) -> None:
            unlike.extend(seen)
            seen.clear()
            self._note(target, runs)

        # Batches of one target each: one look in a hold.
        for batch in self._batches([(family.first, family.first.pieces)]):
            self._each_run(batch, self._copy, OWNED, look, after=after, writes=True)

    def _look_at_kin(self, family: Family, target: Target, runs: Extents) -> list[_Unlike]:
        # The pages that descendants do not share.
        # All pages of a hold at once: there may be a hundred page tables to walk.
        for space, ranges in family.excluded:
            near = cut_to(runs, ranges["start"], ranges["end"])
            if len(on_same_frames(space.walk(as_pieces(near)), near)):
                raise AttemptFailed(
                    f"{target.name}: a descendant has inherited pages that it should not have",
                    "report it, with the images",
                )
        unlike = []
        for descendant in family.descendants:
            pieces = cut_to(descendant.pieces, runs["gva"], ends_of(runs))
            same = on_same_frames(descendant.space.walk(pieces), runs)
            if len(rest := left_of(pieces, same)):
                unlike.append(_Unlike(target, descendant, rest))
        return unlike

    def _not_shared(self, unlike: Sequence[_Unlike]) -> list[Part]:
        # Pages that a descendant still has on other frames than the first task. While the guest
        # moves a shared page, its page tables are changed one after the other, and the content
        # moves along; a page of its own would have the right content, but not be shared.
        left: list[Part] = []
        for _ in range(_TRIES_TO_SHARE):
            if not unlike:
                break
            time.sleep(TRY_AGAIN_AFTER)
            own, unlike = unbroken(self.holder, partial(_look_again, unlike))
            left += own
        return left + [(descendant, pieces) for _, descendant, pieces in unlike]

    def verify(self, targets: Sequence[Target], mode: str) -> int:
        """Compare pieces with their source; return the bytes compared.

        Args:
            targets: all targets, each once.
            mode: one of `VERIFY_MODES`: none of the pages, a sample, or all.

        Raises:
            VerifyMismatch: a page is not what was written.
            AttemptFailed: as `write`.
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

    def _copy(self, ready: Ready[Feed | Lane], runs: Extents) -> int:
        # SAFETY: by the guest kernel's flags, read in this hold, the frames are the target's own: a
        # task's exclusive anonymous pages, those of the waiting CRIU that has the pool, anonymous
        # pages that only tasks of the tree can have, or pages of a shared object that only the tree
        # has. The hold keeps them still: no vCPU runs until it ends, the tasks are stopped under
        # CRIU until the commit, and CRIU waits with the pool for a request; once the hold has ended
        # the gate lets no write through. The content stays: the frame is dirty, or swap has no copy
        # that reclaim could go back to. Undone by killing the tree, and by giving the pool back.
        return ready.pages.copy(ready.target.space.ram, runs)

    def _compare(self, ready: Ready[Feed | Lane], runs: Extents) -> int:
        compared, gva = ready.pages.compare(ready.target.space.ram, runs)
        if gva is not None:
            raise VerifyMismatch(
                f"{ready.target.name}: the page at {gva:#x} is not what was written",
                "restore again; if it happens again, report it with the guest's kernel log",
            )
        return compared

    def _note(self, target: Target, runs: Extents) -> None:
        self.journal.add_memory(target.name, runs)
        self._advance(total(runs))


def _look_again(unlike: Sequence[_Unlike]) -> tuple[list[Part], list[_Unlike]]:
    # In a hold: pages that are still on other frames, and those that cannot be compared.
    own: list[Part] = []
    absent = []
    for check in {one.check for pair in unlike for one in (pair.first, pair.descendant)}:
        check()
    for first, descendant, pieces in unlike:
        theirs = first.space.walk(pieces)
        there = cut_to(descendant.space.walk(pieces), theirs["gva"], ends_of(theirs))
        same = on_same_frames(there, theirs)
        if len(other := left_of(as_pieces(there), same)):
            own.append((descendant, other))
        if len(gone := left_of(pieces, there)):
            absent.append(_Unlike(first, descendant, gone))
    return own, absent
