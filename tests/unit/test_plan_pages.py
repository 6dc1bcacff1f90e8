"""The vectorised placement against a page-by-page model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr.images.pagemap import PAGEMAP_DTYPE
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.ranges import RANGE, join
from ovr.plan import pages
from ovr.plan.pages import Allocation, Area, Cow, Reason, place

BASE = 0x7000_0000_0000


def pagemap(*entries):
    rows, offset = [], 0
    for page, count in entries:
        rows.append((BASE + page * PAGE_SIZE, count * PAGE_SIZE, 4, 0, offset))
        offset += count * PAGE_SIZE
    return np.array(rows, dtype=PAGEMAP_DTYPE)


def area(first, last, reason=Reason.OUTSIDE, **how):
    return Area(BASE + first * PAGE_SIZE, BASE + last * PAGE_SIZE, reason, **how)


def ranges(*pages):
    rows = [(BASE + first * PAGE_SIZE, BASE + last * PAGE_SIZE) for first, last in pages]
    return np.array(rows, dtype=RANGE)


def pages_of(runs):
    return {
        start + n * PAGE_SIZE: (offset + n * PAGE_SIZE, Reason(reason))
        for start, size, offset, _, reason, _ in runs.tolist()
        for n in range(size // PAGE_SIZE)
    }


def summary(runs):
    return [(int(r["size"]) // PAGE_SIZE, Reason(r["reason"])) for r in runs]


def allocations(runs):
    return [Allocation(r) for r in runs["allocation"]]


def test_an_entry_across_two_areas_is_cut():
    runs = place(pagemap((0, 10)), [area(0, 4), area(4, 10, Reason.VDSO)], Cow())
    assert runs.tolist() == [
        (BASE, 4 * PAGE_SIZE, 0, 0, Reason.OUTSIDE, 0),
        (BASE + 4 * PAGE_SIZE, 6 * PAGE_SIZE, 4 * PAGE_SIZE, 0, Reason.VDSO, 0),
    ]


def test_what_is_shared_copy_on_write_stays_inside():
    runs = place(
        pagemap((0, 10), (12, 2)), [area(0, 10), area(10, 20)], Cow(inside=ranges((3, 5), (9, 13)))
    )
    assert summary(runs) == [
        (3, Reason.OUTSIDE),
        (2, Reason.COW),
        (4, Reason.OUTSIDE),
        (1, Reason.COW),
        (1, Reason.COW),
        (1, Reason.OUTSIDE),
    ]


def test_what_an_ancestor_has_written():
    cow = Cow(inherited=ranges((2, 4)), inside=ranges((4, 5)))
    runs = place(pagemap((0, 10)), [area(0, 10)], cow)
    assert summary(runs) == [
        (2, Reason.OUTSIDE),
        (2, Reason.INHERITED),
        (1, Reason.COW),
        (5, Reason.OUTSIDE),
    ]


def test_what_descendants_inherit_is_allocated_before_they_are_made():
    table = pagemap((0, 40), VDSO[0])
    runs = place(table, [area(0, 40, **ANON), VDSO[1]], Cow(before_fork=ranges((0, 20))))
    assert summary(runs) == [(20, Reason.OUTSIDE), (20, Reason.OUTSIDE), (1, Reason.VDSO)]
    assert allocations(runs)[:2] == [Allocation.BEFORE_FORK, Allocation.CRIU]


def test_something_always_stays_inside():
    runs = place(pagemap((0, 10), (20, 2)), [area(0, 10), area(20, 22)], Cow())
    inside = runs[runs["reason"] != Reason.OUTSIDE]
    assert inside.tolist() == [
        (BASE + 20 * PAGE_SIZE, PAGE_SIZE, 10 * PAGE_SIZE, 0, Reason.ANCHOR, 0)
    ]
    assert int(runs["size"].sum()) == 12 * PAGE_SIZE
    assert place(pagemap((3, 1)), [area(0, 10)], Cow()).tolist() == [
        (BASE + 3 * PAGE_SIZE, PAGE_SIZE, 0, 0, Reason.ANCHOR, 0)
    ]


def test_a_task_without_pages():
    assert len(place(pagemap(), [area(0, 1)], Cow())) == 0
    assert len(place(pagemap(), [], Cow())) == 0


VDSO = (1000, 1), area(1000, 1001, Reason.VDSO)
ANON = {"populates": True, "divisible": True}
HUGE = {"populates": True, "touchable": False}


def test_criu_populates_whole_areas_and_large_pieces():
    table = pagemap((0, 1), (10, 16), (30, 15), (60, 20), VDSO[0])
    areas = [area(0, 1, **ANON), area(10, 50, **ANON), area(60, 80), VDSO[1]]
    assert allocations(place(table, areas, Cow()))[:4] == [
        Allocation.CRIU,  # all of its area
        Allocation.CRIU,  # large enough
        Allocation.AGENT,
        Allocation.AGENT,  # nobody can be asked for it
    ]


def test_pieces_are_found_in_memory_not_in_the_images():
    table = pagemap((0, 8), (8, 8), VDSO[0])
    table["level"][1] = 1
    table["offset"][1] = 0
    runs = place(table, [area(0, 40, **ANON), VDSO[1]], Cow())
    assert allocations(runs)[:2] == [Allocation.CRIU, Allocation.CRIU]


def test_only_the_largest_pieces_of_an_area(monkeypatch):
    monkeypatch.setattr(pages, "_MOST_PIECES", 2)
    table = pagemap((0, 16), (20, 18), (40, 17), (60, 16), (100, 16), VDSO[0])
    runs = place(table, [area(0, 80, **ANON), area(80, 200, **ANON), VDSO[1]], Cow())
    assert allocations(runs)[:5] == [
        Allocation.AGENT, Allocation.CRIU, Allocation.CRIU, Allocation.AGENT, Allocation.CRIU,
    ]  # fmt: skip


def test_read_only_hugetlb_areas_go_outside_whole_or_not_at_all():
    table = pagemap((0, 512), (600, 100), VDSO[0])
    runs = place(table, [area(0, 512, **HUGE), area(600, 1000, **HUGE), VDSO[1]],
                 Cow())  # fmt: skip
    assert summary(runs)[:2] == [(512, Reason.OUTSIDE), (100, Reason.HUGETLB)]
    assert allocations(runs)[0] == Allocation.CRIU


VERDICTS = [Reason.OUTSIDE, Reason.VDSO, Reason.SPECIAL, Reason.READ_ONLY, Reason.NOT_ASKED]


@st.composite
def tasks(draw):
    areas, entries, at = [], [], 0
    for _ in range(draw(st.integers(1, 6))):
        at += draw(st.integers(0, 3))
        size = draw(st.integers(1, 12))
        areas.append(area(at, at + size, draw(st.sampled_from(VERDICTS))))
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
    shared = draw(st.lists(st.tuples(st.integers(0, 80), st.integers(1, 9)), max_size=4))
    return areas, entries, join(ranges(*((at, at + size) for at, size in shared)))


@settings(max_examples=300)
@given(task=tasks())
def test_place_agrees_with_a_page_by_page_model(task):
    areas, entries, shared = task
    table = pagemap(*entries)
    runs = place(table, areas, Cow(inside=shared))
    expected = {}
    for gva, size, _, _, offset in table.tolist():
        for n in range(size // PAGE_SIZE):
            page = gva + n * PAGE_SIZE
            [owner] = [a for a in areas if a.start <= page < a.end]
            common = any(start <= page < end for start, end in shared.tolist())
            expected[page] = (offset + n * PAGE_SIZE, Reason.COW if common else owner.reason)
    got = pages_of(runs)
    anchors = [page for page, (_, reason) in got.items() if reason == Reason.ANCHOR]
    if expected and all(reason == Reason.OUTSIDE for _, reason in expected.values()):
        [anchor] = anchors
        expected[anchor] = (expected[anchor][0], Reason.ANCHOR)
    assert got == expected
    assert runs["gva"].tolist() == sorted(runs["gva"].tolist())


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_text(reason):
    assert reason.text
