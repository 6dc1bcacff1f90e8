"""Copiers for the tests: one that counts how often it met a race, and one without protection."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ovr._fastcopy import OWNED
from ovr.attempt import attempt, in_holds
from ovr.attempt.copier import Copier
from ovr.attempt.feed import Feed
from ovr.attempt.in_holds import Look, Ready, Work
from ovr.attempt.targets import Family, Part, Target
from ovr.kernel import Kernel
from ovr.memory.extents import Extents, first_bytes, left_of, total
from ovr.memory.paging import Frames

__all__ = ["Races", "before_each_copy", "counting", "ignoring_clean", "unprotected"]

Prepared = list[list[Ready[Feed]]]

PAGE = 4096
HOLD_BYTES = 16 << 20


@dataclass
class Races:
    """Events that the copier met.

    Attributes:
        away: pages that no page table led to when it came to them.
        foreign: pages that were there, and not the tree's own: merged, shared, or on the move.
        moved: pages that had another frame, or another owner, when they were written than when they
            were looked up; only without protection.
    """

    away: int = 0
    foreign: int = 0
    moved: int = 0

    def __str__(self) -> str:
        return f"{self.away} away, {self.foreign} not its own, {self.moved} moved"


@contextmanager
def counting(races: Races, pause: float) -> Iterator[None]:
    """Have restores count the pages that the protection put off to another hold.

    Args:
        races: what was met.
        pause: seconds before each hold, for the guest to do something.
    """

    class Counting(Copier):
        def _prepare(self, batch: Sequence[Part], *, aside: bool = False) -> Prepared:
            ready = super()._prepare(batch, aside=aside)
            time.sleep(pause)
            return ready

        def write(self, parts: Sequence[Part]) -> None:
            super().write([(_counted(target), part) for target, part in parts])

        def write_families(self, families: Sequence[Family]) -> list[Part]:  # type: ignore[override]
            return super().write_families(
                [replace(family, first=_counted(family.first)) for family in families]
            )

    def _counted(target: Target) -> Target:
        return replace(target, ask=partial(note, target))

    def note(target: Target, pieces: Extents) -> None:
        there = total(target.space.walk(pieces)) // PAGE
        races.away += total(pieces) // PAGE - there
        races.foreign += there
        target.ask(pieces)

    with _in_place_of_the_copier(Counting):
        yield


@contextmanager
def unprotected(races: Races, pause: float) -> Iterator[None]:
    """Have restores write as if nothing ever moved: looked up first, written later.

    Nothing is held still from the one to the other, nobody is asked whose a page is. What would
    have been refused is counted.

    Args:
        races: what was met.
        pause: seconds between the look and the write.
    """

    class Unprotected(Copier):
        def _each_run(
            self,
            batch: Sequence[Part],
            work: Work[Feed],
            wanted: int,
            then: Look | None = None,
            *,
            after: Look | None = None,
            again: bool = True,
            writes: bool = False,
        ) -> None:
            if not writes:  # to verify is not what is tried here
                super()._each_run(batch, work, wanted, then, after=after, again=again)
                return
            for target, part in batch:
                feed = Feed.make(target.source, part, aside=True)
                runs = target.space.walk(feed.part)
                races.away += (total(part) - total(runs)) // PAGE
                time.sleep(pause)
                while len(runs):
                    with self.holder.held():
                        did = first_bytes(runs, runs, work(Ready(target, feed), runs))
                    now = target.space.walk(part, target.frames)
                    races.moved += len(_pages(did) - _pages(now[(now["flags"] & OWNED) == OWNED]))
                    if then:
                        then(target, did)
                    if after:
                        after(target, did)
                    runs = left_of(runs, did)

    with _in_place_of_the_copier(Unprotected):
        yield


@contextmanager
def before_each_copy(act: Callable[[], None]) -> Iterator[None]:
    """Have restores do something with the VM running, before each hold in which they copy."""

    class Late(Copier):
        def _prepare(self, batch: Sequence[Part], *, aside: bool = False) -> Prepared:
            ready = super()._prepare(batch, aside=aside)
            act()
            return ready

    with _in_place_of_the_copier(Late):
        yield


@contextmanager
def ignoring_clean() -> Iterator[None]:
    """Have restores write to clean pages of which swap has a copy, too."""
    usual = Kernel.private_frames, Kernel.anon_frames, Kernel.shared_frames

    def any_is_dirty(frames: Frames) -> Frames:
        return replace(frames, dirty_mask=(1 << 64) - 1)

    private, anon, shared = Kernel.private_frames, Kernel.anon_frames, Kernel.shared_frames
    Kernel.private_frames = property(lambda self: any_is_dirty(private.func(self)))
    Kernel.anon_frames = lambda self, anon_vma: any_is_dirty(anon(self, anon_vma))
    Kernel.shared_frames = lambda self, mapping: any_is_dirty(shared(self, mapping))
    try:
        yield
    finally:
        Kernel.private_frames, Kernel.anon_frames, Kernel.shared_frames = usual


def _pages(runs: Extents) -> set[tuple[int, int]]:
    # GVA and GPA of each page.
    counts = (runs["size"] // PAGE).astype(int)
    steps = np.concatenate([np.arange(count, dtype="<u8") for count in counts] or [[]]) * PAGE
    gva = np.repeat(runs["gva"], counts) + steps.astype("<u8")
    gpa = np.repeat(runs["gpa"], counts) + steps.astype("<u8")
    return {*zip(gva.tolist(), gpa.tolist(), strict=True)}


@contextmanager
def _in_place_of_the_copier(kind: type[Copier]) -> Iterator[None]:
    # Many small holds: more borders between them.
    assert attempt.Copier is Copier
    size = in_holds.HOLD_BYTES
    attempt.Copier, in_holds.HOLD_BYTES = kind, HOLD_BYTES  # type: ignore[misc]
    try:
        yield
    finally:
        attempt.Copier, in_holds.HOLD_BYTES = Copier, size  # type: ignore[misc]
