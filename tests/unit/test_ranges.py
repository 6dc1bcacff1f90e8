"""Parts add up to the whole, whatever the limit."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ovr._fastcopy import RUN
from ovr.addresses import PAGE_SIZE
from ovr.ranges import split, total

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
