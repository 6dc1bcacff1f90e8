"""The search that all name tables share, against a plain one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ovr.kernel.symbols import SymbolTable, matching

NAMES = st.lists(st.text("ab", max_size=3), max_size=30)


@given(NAMES, st.text("ab", max_size=4), st.booleans())
def test_names_are_found_whole_and_nothing_else(names, wanted, with_sizes):
    text = "".join(name + "\n" for name in names).encode()
    sizes = np.array([len(name) + 1 for name in names], np.int64)
    starts = np.cumsum(sizes) - sizes
    table = np.frombuffer(text, np.uint8)
    found = matching(table, starts, wanted.encode() + b"\n", sizes if with_sizes else None)
    assert found == [number for number, name in enumerate(names) if name == wanted]


@given(st.binary(max_size=50), st.lists(st.integers(0, (1 << 32) - 1), max_size=20))
def test_starts_may_be_anything(text, starts):
    places = np.array(starts, np.uint32)
    found = matching(np.frombuffer(text, np.uint8), places, b"\0")
    assert found == [n for n, at in enumerate(starts) if text[at : at + 1] == b"\0"]


def test_suffixes_may_share_their_bytes():
    # as linkers merge string tables
    names = np.frombuffer(b"\0start_kernel\0", np.uint8)
    table = SymbolTable(names, np.array([1, 7]), np.array([10, 20], np.uint64), b"\0")
    assert list(table) == [("start_kernel", 10), ("kernel", 20)]
    assert (table.get("kernel"), table.get("start_kernel"), table.get("tart_kernel")) == (
        20, 10, None,
    )  # fmt: skip
