"""The vectorised placement against a page-by-page model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr import placement
from ovr.addresses import PAGE_SIZE
from ovr.images.pagemap import PAGEMAP_DTYPE
from ovr.placement import Area, Reason, place

BASE = 0x7000_0000_0000


def pagemap(*entries):
    rows, offset = [], 0
    for page, count in entries:
        rows.append((BASE + page * PAGE_SIZE, count, 4, 0, offset))
        offset += count * PAGE_SIZE
    return np.array(rows, dtype=PAGEMAP_DTYPE)


def area(first, last, reason=Reason.OUTSIDE):
    return Area(BASE + first * PAGE_SIZE, BASE + last * PAGE_SIZE, reason)


def pages_of(runs):
    return {
        start + n * PAGE_SIZE: (offset + n * PAGE_SIZE, Reason(reason))
        for start, size, offset, _, reason in runs.tolist()
        for n in range(size // PAGE_SIZE)
    }


def test_an_entry_across_two_areas_is_cut():
    runs = place(pagemap((0, 10)), [area(0, 4), area(4, 10, Reason.STACK)], [])
    assert runs.tolist() == [
        (BASE, 4 * PAGE_SIZE, 0, 0, Reason.OUTSIDE),
        (BASE + 4 * PAGE_SIZE, 6 * PAGE_SIZE, 4 * PAGE_SIZE, 0, Reason.STACK),
    ]


def test_late_pages_stay_inside():
    late = BASE + 5 * PAGE_SIZE + 77
    runs = place(pagemap((0, 10)), [area(0, 10)], [late, late + 1, BASE - 1])
    assert [(int(r["size"]) // PAGE_SIZE, Reason(r["reason"])) for r in runs] == [
        (5, Reason.OUTSIDE),
        (1, Reason.LATE),
        (4, Reason.OUTSIDE),
    ]


def test_something_always_stays_inside():
    runs = place(pagemap((0, 10), (20, 2)), [area(0, 10), area(20, 22)], [])
    inside = runs[runs["reason"] != Reason.OUTSIDE]
    assert inside.tolist() == [(BASE + 20 * PAGE_SIZE, PAGE_SIZE, 10 * PAGE_SIZE, 0, Reason.ANCHOR)]
    assert int(runs["size"].sum()) == 12 * PAGE_SIZE
    assert place(pagemap((3, 1)), [area(0, 10)], []).tolist() == [
        (BASE + 3 * PAGE_SIZE, PAGE_SIZE, 0, 0, Reason.ANCHOR)
    ]


def test_a_task_without_pages():
    assert len(place(pagemap(), [area(0, 1)], [])) == 0
    assert len(place(pagemap(), [], [])) == 0


def test_the_largest_runs_of_an_area_go_outside(monkeypatch):
    monkeypatch.setattr(placement, "_MAX_RUNS_PER_AREA", 2)
    runs = place(pagemap((0, 1), (2, 3), (6, 2), (9, 1), (20, 1)), [area(0, 15), area(15, 30)], [])
    assert [Reason(r) for r in runs["reason"]] == [
        Reason.FRAGMENTED,
        Reason.OUTSIDE,
        Reason.OUTSIDE,
        Reason.FRAGMENTED,
        Reason.OUTSIDE,
    ]


@st.composite
def tasks(draw):
    areas, entries, at = [], [], 0
    for _ in range(draw(st.integers(1, 6))):
        at += draw(st.integers(0, 3))
        size = draw(st.integers(1, 12))
        areas.append(area(at, at + size, draw(st.sampled_from(list(Reason)[:6]))))
        at += size
    mapped = sorted(
        {page for a in areas for page in range((a.start - BASE) >> 12, (a.end - BASE) >> 12)}
    )
    present = [page for page in mapped if draw(st.booleans())]
    for page in present:
        if entries and entries[-1][0] + entries[-1][1] == page and draw(st.booleans()):
            entries[-1] = (entries[-1][0], entries[-1][1] + 1)
        else:
            entries.append((page, 1))
    late = draw(st.lists(st.integers(0, 80), max_size=4))
    return areas, entries, [BASE + page * PAGE_SIZE + 5 for page in late]


@settings(max_examples=300)
@given(task=tasks())
def test_place_agrees_with_a_page_by_page_model(task):
    areas, entries, late = task
    table = pagemap(*entries)
    runs = place(table, areas, late)
    expected = {}
    for vaddr, count, _, _, offset in table.tolist():
        for n in range(count):
            page = vaddr + n * PAGE_SIZE
            [owner] = [a for a in areas if a.start <= page < a.end]
            touched = any(gva & -PAGE_SIZE == page for gva in late)
            expected[page] = (offset + n * PAGE_SIZE, Reason.LATE if touched else owner.reason)
    got = pages_of(runs)
    anchors = [page for page, (_, reason) in got.items() if reason == Reason.ANCHOR]
    if expected and all(reason == Reason.OUTSIDE for _, reason in expected.values()):
        [anchor] = anchors
        expected[anchor] = (expected[anchor][0], Reason.ANCHOR)
    assert got == expected
    assert runs["start"].tolist() == sorted(runs["start"].tolist())


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_text(reason):
    assert reason.text
