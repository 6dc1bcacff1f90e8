"""Parts add up to the whole, whatever the limit."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ovr._fastcopy import RUN
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.extents import cut_out, cut_to, split, total
from ovr.memory.ranges import RANGE, common, join, without

PAGES = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, 50)), max_size=30)


def pages_of(ranges):
    return [
        (gva + n * PAGE_SIZE, gpa + n * PAGE_SIZE, offset + n * PAGE_SIZE, flags)
        for gva, gpa, size, offset, flags, _ in ranges.tolist()
        for n in range(size // PAGE_SIZE)
    ]


@given(rows=PAGES, limit=st.integers(1, 64))
def test_split_keeps_every_page_in_order(rows, limit):
    ranges = np.array(
        [
            (page * PAGE_SIZE, (page ^ 5) * PAGE_SIZE, count * PAGE_SIZE, page * 8192, page & 7, 12)
            for page, count in rows
        ],
        dtype=RUN,
    )
    before = ranges.copy()
    parts = list(split(ranges, limit * PAGE_SIZE))
    assert [page for part in parts for page in pages_of(part)] == pages_of(ranges)
    assert all(total(part) == limit * PAGE_SIZE for part in parts[:-1])
    assert all((part["size"] > 0).all() for part in parts)
    assert np.array_equal(ranges, before)


@given(rows=PAGES, holes=st.lists(st.integers(0, 60 * PAGE_SIZE), unique=True, max_size=9))
def test_cut_out_leaves_every_byte_that_is_in_no_hole(rows, holes):
    at, runs = 0, []
    for page, count in rows:
        at += page % 3 * PAGE_SIZE
        runs.append((at, at ^ 1 << 40, count * PAGE_SIZE, 7 * at, page & 7, 12))
        at += count * PAGE_SIZE
    runs = np.array(runs, dtype=RUN)
    edges = sorted(holes)[: len(holes) & ~1]
    ranges = np.array(list(zip(edges[::2], edges[1::2], strict=True)), dtype=RANGE)
    before = runs.copy()
    left = cut_out(runs, ranges)
    assert np.array_equal(runs, before)
    assert (left["size"] > 0).all()
    starts, ends = left["gva"].tolist(), (left["gva"] + left["size"]).tolist()
    for low, high in ranges.tolist():
        assert not any(start < high and low < end for start, end in zip(starts, ends, strict=True))
    inside = sum(
        max(0, min(high, gva + size) - max(low, gva))
        for low, high in ranges.tolist()
        for gva, _, size, *_ in runs.tolist()
    )
    assert total(left) == total(runs) - inside
    assert total(cut_to(runs, ranges["start"], ranges["end"])) == inside
    for gva, gpa, _, offset, *_ in left.tolist():
        [(old_gva, old_gpa, old_offset)] = [
            (g, p, o) for g, p, size, o, *_ in runs.tolist() if g <= gva < g + size
        ]
        assert (gpa - old_gpa, offset - old_offset) == (gva - old_gva, gva - old_gva)


SETS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=8)


def numbers(ranges):
    return {number for start, end in ranges.tolist() for number in range(start, end)}


@given(one=SETS, other=SETS)
def test_ranges_are_sets(one, other):
    arrays = [np.array([(at, at + n) for at, n in rows], dtype=RANGE) for rows in (one, other)]
    left, right = map(numbers, arrays)
    for made, expected in (
        (join(*arrays), left | right),
        (join(arrays[0]), left),
        (common(*arrays), left & right),
        (without(*arrays), left - right),
    ):
        assert numbers(made) == expected
        flat = [edge for row in made.tolist() for edge in row]
        assert flat == sorted(set(flat))
