"""Pages of a descendant that are still its ancestor's; how work is divided among threads."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovr._fastcopy import PIECE, RUN
from ovr.attempt import copier as copying
from ovr.attempt.copier import Copier, _Unlike
from ovr.attempt.journal import Journal
from ovr.attempt.threads import Threads
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.extents import as_pieces, cut_to, left_of, on_same_frames, total

FRAMES = st.lists(st.sampled_from([None, 0, 1, 2, 3, 7, 8, 9]), min_size=1, max_size=30)


def runs_of(frames):
    """Return runs as a walk does, for pages with these frames."""
    rows = []
    for page, frame in enumerate(frames):
        if frame is None:
            continue
        gva, gpa = page * PAGE_SIZE, frame * PAGE_SIZE
        if rows and rows[-1][0] + rows[-1][2] == gva and rows[-1][1] + rows[-1][2] == gpa:
            rows[-1][2] += PAGE_SIZE
        else:
            rows.append([gva, gpa, PAGE_SIZE, gva, 0, 12])
    return np.array([tuple(row) for row in rows], dtype=RUN)


def pages_of(runs):
    return {
        gva + n for gva, size in runs[["gva", "size"]].tolist() for n in range(0, size, PAGE_SIZE)
    }


@given(descendant=FRAMES, first=FRAMES)
def test_same_frames(descendant, first):
    same = on_same_frames(runs_of(descendant), runs_of(first))
    expected = {
        page * PAGE_SIZE
        for page, (one, other) in enumerate(zip(descendant, first, strict=False))
        if one is not None and one == other
    }
    assert pages_of(same) == expected
    assert all(gva == offset for gva, offset in same[["gva", "offset"]].tolist())


@given(frames=FRAMES)
def test_what_is_left(frames):
    whole = np.array([(0, len(frames) * PAGE_SIZE, 0)], dtype=PIECE)
    done = runs_of(frames)
    left = left_of(whole, done)
    assert pages_of(left) == pages_of(whole) - pages_of(done)
    assert pages_of(as_pieces(done)) == pages_of(done)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("pages", [1, 255, 257, 2049])
def test_threads_get_whole_pages(threads, pages):
    runs = np.array([(0x7000_0000_0000, pages * 4096, 0)], PIECE)
    with ThreadPoolExecutor(threads) as pool:
        shares = Threads(pool, threads).on_parts(runs, lambda share: share)
    assert len(shares) <= threads
    assert all((share["gva"] | share["size"]) % 4096 == 0 for share in shares)
    assert sum(map(total, shares)) == total(runs)


@dataclass
class Task:
    """One whose page table is another one at each look; the last one stays."""

    looks: list
    checked: list = field(default_factory=list)

    @property
    def space(self):
        return self

    def walk(self, pieces):
        runs = runs_of(self.looks[0])
        self.looks = self.looks[1:] or self.looks
        return cut_to(runs, pieces["gva"], pieces["gva"] + pieces["size"])

    def check(self):
        self.checked.append(len(self.looks))


@pytest.mark.parametrize(
    ("first", "descendant", "own"),
    [
        pytest.param([[4, 5]], [[4, None], [4, 5]], [], id="moved in the descendant"),
        pytest.param([[4, None], [4, 5]], [[4, 5]], [], id="moved in the first"),
        pytest.param([[4, None], [4, 6]], [[4, None], [4, 6]], [], id="moved in both"),
        pytest.param([[4, 5]], [[4, 6]], [1], id="another page"),
        pytest.param([[4, None], [4, 5]], [[4, None], [4, 6]], [1], id="another page, later"),
        pytest.param([[4, 5]], [[4, None]], [1], id="never there"),
        pytest.param([[4, 5]], [[None, 6]], [0, 1], id="one of each"),
    ],
)
def test_a_page_that_moves_is_shared_still(first, descendant, own, monkeypatch):
    """Neither is it given a content of its own because it was absent for a moment."""
    monkeypatch.setattr(copying, "TRY_AGAIN_AFTER", 0)
    one, other = Task(first), Task(descendant)
    copier = Copier(SimpleNamespace(held=nullcontext), None, 1, Journal())
    whole = np.array([(0, 2 * PAGE_SIZE, 0)], dtype=PIECE)
    left = copier._not_shared([_Unlike(one, other, whole)])
    assert all(target is other for target, _ in left)
    assert sorted(page for _, runs in left for page in pages_of(runs)) == [
        page * PAGE_SIZE for page in own
    ]
    assert one.checked and other.checked
