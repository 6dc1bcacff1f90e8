"""The kernel's containers, sound and damaged."""

import itertools
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr.errors import GuestFault, KernelNotFound
from ovr.kernel.linux.list import list_for_each_entry
from ovr.kernel.linux.maple import mt_for_each
from ovr.kernel.linux.rbtree import rbtree_for_each_entry
from ovr.kernel.linux.xarray import idr_find, xa_load
from ovr.kernel.types.btf import Btf
from ovr.kernel.types.live import settled
from ovr.kernel.types.types import Types

from .toy import POISON, TYPES
from .writers import BtfWriter, Memory

BASE = 0xFFFF_8880_0000_0000
HEAD = BASE + 0x100
ITEMS = [BASE + 0x1000 + 64 * n for n in range(10)]
LAST = (1 << 64) - 1


def keys(entries):
    return [entry.key for entry in entries]


@pytest.fixture
def memory():
    made = Memory(BASE, 1 << 18)
    for key, item in enumerate(ITEMS):
        made.poke(item, "i", key)
    return made


def link(memory, items):
    nodes = [HEAD, *(item + 8 for item in items), HEAD]
    for one, two in pairwise(nodes):
        memory.poke(one, "Q", two)
        memory.poke(two + 8, "Q", one)


def list_keys(memory):
    head = TYPES.object("struct list_head", memory, HEAD)
    return keys(list_for_each_entry("struct item", head, "link"))


def test_lists(memory):
    link(memory, [])
    assert list_keys(memory) == []
    link(memory, [ITEMS[n] for n in (3, 1, 4, 0, 5)])
    assert list_keys(memory) == [3, 1, 4, 0, 5]


def test_a_list_that_loops(memory):
    link(memory, ITEMS)
    memory.poke(ITEMS[7] + 8, "Q", ITEMS[2] + 8)
    with pytest.raises(GuestFault, match="a list has no end"):
        list_keys(memory)


@pytest.mark.parametrize("target", [0, POISON])
def test_a_list_that_was_cut(memory, target):
    link(memory, ITEMS)
    memory.poke(ITEMS[7] + 8, "Q", target)
    with pytest.raises(GuestFault):
        list_keys(memory)


def test_a_list_that_is_longer_than_any(memory, monkeypatch):
    monkeypatch.setattr("ovr.kernel.linux.list.MAX_ENTRIES", 9)
    link(memory, ITEMS[:9])
    assert list_keys(memory) == list(range(9))
    link(memory, ITEMS)
    with pytest.raises(GuestFault, match="a list has no end"):
        list_keys(memory)


def plant(memory, low, high):
    # A balanced tree of ITEMS[low:high]; returns its root.
    if low >= high:
        return 0
    middle = (low + high) // 2
    node = ITEMS[middle] + 40
    memory.poke(node + 16, "Q", plant(memory, low, middle))
    memory.poke(node + 8, "Q", plant(memory, middle + 1, high))
    return node


def test_red_black_trees(memory):
    root = TYPES.object("struct rb_root", memory, HEAD)
    assert keys(rbtree_for_each_entry("struct item", root, "rb")) == []
    memory.poke(HEAD, "Q", plant(memory, 0, 10))
    assert keys(rbtree_for_each_entry("struct item", root, "rb")) == list(range(10))
    memory.poke(ITEMS[9] + 40 + 8, "Q", ITEMS[0] + 40)
    with pytest.raises(GuestFault, match="loops"):
        keys(rbtree_for_each_entry("struct item", root, "rb"))
    memory.poke(ITEMS[0] + 40 + 16, "Q", ITEMS[0] + 40)
    with pytest.raises(GuestFault, match="loops"):
        keys(rbtree_for_each_entry("struct item", root, "rb"))


class XArray:
    """Writes an xarray the way lib/xarray.c lays it out."""

    def __init__(self, memory):
        self.memory = memory
        self.free = BASE + 0x4000

    def node(self, shift):
        at, self.free = self.free, self.free + 576
        self.memory.poke(at, "B", shift)
        return at + 2

    def build(self, entries):
        if not entries:
            return 0
        if set(entries) == {0}:
            return entries[0]
        top = max(max(entries).bit_length() - 1, 0) // 6 * 6
        root = self.node(top)
        for index, entry in entries.items():
            node = root
            for shift in range(top, 0, -6):
                slot = node - 2 + 8 + 8 * (index >> shift & 63)
                if not self.memory.peek(slot, "Q"):
                    self.memory.poke(slot, "Q", self.node(shift - 6))
                node = self.memory.peek(slot, "Q")
            self.memory.poke(node - 2 + 8 + 8 * (index & 63), "Q", entry)
        return root


@settings(max_examples=50)
@given(st.sets(st.integers(0, 1 << 22) | st.integers(0, 200), max_size=12), st.integers(0, 1 << 24))
def test_xarrays(indexes, probe):
    memory = Memory(BASE, 1 << 18)
    entries = {index: BASE + 8 * index for index in indexes}
    memory.poke(HEAD + 8, "Q", XArray(memory).build(entries))
    array = TYPES.object("struct xarray", memory, HEAD)
    for index in {*indexes, probe, 0, LAST}:
        assert xa_load(array, index) == entries.get(index, 0)


def test_xarray_entries_that_are_not_pointers(memory):
    writer = XArray(memory)
    root = writer.build({5: BASE, 70: BASE + 8})
    child = memory.peek(root - 2 + 8, "Q")
    memory.poke(HEAD + 8, "Q", root)
    array = TYPES.object("struct xarray", memory, HEAD)
    memory.poke(child - 2 + 8 + 8 * 6, "Q", 5 << 2 | 2)  # a sibling of slot 5
    assert xa_load(array, 6) == BASE
    memory.poke(child - 2 + 8 + 8 * 7, "Q", 257 << 2 | 2)  # XA_ZERO_ENTRY
    assert xa_load(array, 7) == 0
    memory.poke(child - 2 + 8 + 8 * 8, "Q", root)
    with pytest.raises(GuestFault, match="loops"):
        xa_load(array, 8)
    memory.poke(HEAD + 8, "Q", 256 << 2 | 2)  # XA_RETRY_ENTRY
    assert xa_load(array, 0) == 0


def test_idr_with_a_base(memory):
    memory.poke(HEAD + 8, "Q", XArray(memory).build({0: BASE, 3: BASE + 8}))
    memory.poke(HEAD + 16, "I", 300)
    idr = TYPES.object("struct idr", memory, HEAD)
    found = {number: idr_find(idr, number) for number in (0, 3, 299, 300, 301, 303, -1)}
    assert found == {0: 0, 3: 0, 299: 0, 300: BASE, 301: 0, 303: BASE + 8, -1: 0}


class Maple:
    """Writes a maple tree the way lib/maple_tree.c lays it out."""

    LEAF, RANGE, ARANGE = 1, 2, 3

    def __init__(self, memory, *, explicit):
        self.memory = memory
        self.explicit = explicit  # whether the last pivot of a node is written or left zero
        self.free = BASE + 0x4000
        self.inner = self.ARANGE

    def node(self, kind, slots, last):
        """`slots` are (last index, entry); returns what the parent keeps."""
        at, self.free = self.free, self.free + 256
        room = 10 if kind == self.ARANGE else 16
        self.memory.poke(at, "Q", BASE + 6)
        for number, (high, entry) in enumerate(slots):
            if number < room - 1 and (self.explicit or high != last or not number):
                self.memory.poke(at + 8 + 8 * number, "Q", high)
            self.memory.poke(at + (80 if room == 10 else 128) + 8 * number, "Q", entry)
        if len(slots) < room:  # rubbish behind the end, as deletions leave it
            self.memory.poke(at + (80 if room == 10 else 128) + 8 * len(slots), "Q", POISON)
        return at | kind << 3 | 4

    def build(self, ranges):
        slots, first = [], 0
        for low, high, entry in ranges:
            if low > first:
                slots.append((low - 1, 0))
            slots.append((high, entry))
            first = high + 1
        if first <= LAST:
            slots.append((LAST, 0))
        kind = self.LEAF
        while len(slots) > 1 or kind == self.LEAF:
            room = 10 if kind == self.ARANGE else 16
            groups = [slots[n : n + room] for n in range(0, len(slots), room)]
            slots = [(group[-1][0], self.node(kind, group, group[-1][0])) for group in groups]
            kind = self.inner
        return slots[0][1] | 2


def maple_tree(memory, root):
    memory.poke(HEAD + 8, "Q", root)
    return list(mt_for_each(TYPES.object("struct maple_tree", memory, HEAD)))


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, LAST), unique=True, max_size=400).map(sorted),
    st.booleans(),
    st.sampled_from([Maple.RANGE, Maple.ARANGE]),
)
def test_maple_trees(borders, explicit, inner):
    memory = Memory(BASE, 1 << 18)
    pairs = list(zip(borders[::2], borders[1::2], strict=False))
    ranges = [(low, high, BASE + 8 * n) for n, (low, high) in enumerate(pairs)]
    writer = Maple(memory, explicit=explicit)
    writer.inner = inner
    assert [tuple(r) for r in maple_tree(memory, writer.build(ranges))] == ranges
    tree = TYPES.object("struct maple_tree", memory, HEAD)
    for at in {0, LAST, *borders[:20], *(border - 1 for border in borders[-20:] if border)}:
        found = [tuple(r) for r in mt_for_each(tree, at, at)]
        assert found == [r for r in ranges if r[0] <= at <= r[1]], at
    for low, high in pairs[:5]:
        found = [tuple(r) for r in mt_for_each(tree, low, high + 9)]
        assert found == [r for r in ranges if r[1] >= low and r[0] <= high + 9]


def test_maple_trees_without_nodes(memory):
    assert maple_tree(memory, 0) == []
    assert maple_tree(memory, BASE) == [(0, 0, BASE)]


RANGES = [(n << 20, (n << 20) + 0xFFF, BASE + 8 * n) for n in range(1, 100)]


def test_reserved_entries_are_none(memory):
    ranges = [*RANGES[:5], (RANGES[5][0], RANGES[5][1], 257 << 2 | 2), *RANGES[6:]]
    found = maple_tree(memory, Maple(memory, explicit=True).build(ranges))
    assert [tuple(r) for r in found] == RANGES[:5] + RANGES[6:]


def test_maple_nodes_that_make_no_sense(memory):
    root = Maple(memory, explicit=True).build(RANGES)
    leaf = BASE + 0x4000
    memory.poke(leaf, "Q", leaf)  # ma_dead_node()
    with pytest.raises(GuestFault, match="was freed"):
        maple_tree(memory, root)
    memory.poke(leaf, "Q", BASE + 6)
    memory.poke(leaf + 8 + 24, "Q", 1)
    with pytest.raises(GuestFault, match="not in order"):
        maple_tree(memory, root)
    with pytest.raises(GuestFault, match="of kind 9"):
        maple_tree(memory, leaf | 9 << 3 | 6)
    with pytest.raises(GuestFault):
        maple_tree(memory, 0x1_0000 | 1 << 3 | 6)


def test_a_maple_tree_that_is_its_own_branch(memory):
    writer = Maple(memory, explicit=False)
    loop = writer.node(Maple.ARANGE, [(LAST, 0)], LAST)
    memory.poke((loop & ~0xFF) + 80, "Q", loop)
    with pytest.raises(GuestFault, match="loops"):
        maple_tree(memory, loop | 2)


def test_settled_tries_again_but_not_for_ever():
    outcomes = [GuestFault("gone", 1), GuestFault("gone", 1), 42]

    def read():
        outcome = outcomes.pop(0)
        if isinstance(outcome, GuestFault):
            raise outcome
        return outcome

    assert settled(read) == 42
    outcomes[:] = [GuestFault(f"gone {n}", n) for n in range(100)]
    with pytest.raises(GuestFault):
        settled(read)
    assert len(outcomes) == 92


def test_a_tree_that_is_larger_than_any(memory, monkeypatch):
    """Page tables may show the same frames everywhere: nodes that differ never end."""
    monkeypatch.setattr("ovr.kernel.linux.rbtree.MAX_ENTRIES", 5)
    memory.poke(HEAD, "Q", ITEMS[0] + 40)
    for one, two in pairwise(ITEMS):
        memory.poke(one + 40, "QQQ", 0, two + 40, 0)
    root = TYPES.object("struct rb_root", memory, HEAD)
    with pytest.raises(GuestFault, match="a red-black tree loops"):
        list(rbtree_for_each_entry("struct item", root, "rb"))


def test_nodes_with_more_pivots_than_any_have(memory):
    """The guest says how many there are: it is not to keep us busy."""
    w = BtfWriter()
    u64, void = w.integer("long unsigned int", 8), w.pointer()
    w.struct("maple_tree", 16, ("ma_root", void, 8))
    mr64 = w.struct(
        "", 1 << 27, ("pivot", w.array(u64, 1 << 24), 8), ("slot", w.array(void, 16), 128)
    )
    w.struct("maple_node", 256, ("parent", void, 0), ("mr64", mr64, 0))
    w.enum("maple_type", maple_leaf_64=1, maple_range_64=2, maple_arange_64=3)
    memory.poke(HEAD + 8, "Q", BASE + 0x1000 | 1 << 3 | 2)
    tree = Types(Btf(w.build())).object("struct maple_tree", memory, HEAD)
    with pytest.raises(KernelNotFound, match="16777216 pivots"):
        list(mt_for_each(tree))


def test_types_that_are_not_what_they_must_be(memory):
    w = BtfWriter()
    w.struct("list_head", 16, ("next", w.integer("long unsigned int", 8), 0))
    head = Types(Btf(w.build())).object("struct list_head", memory, HEAD)
    with pytest.raises(KernelNotFound, match="types are invalid") as caught:
        settled(lambda: list(list_for_each_entry("struct item", head, "link")))
    assert isinstance(caught.value.__cause__, AttributeError)


def test_settled_does_not_wait_for_ever(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    calls = []

    def read():
        calls.append(now[0])
        now[0] += 3.0
        raise GuestFault("no end", 0)

    with pytest.raises(GuestFault):
        settled(read)
    assert calls == [0.0, 3.0]


def test_walks_that_take_too_long(memory, monkeypatch):
    """Entries that differ from one another can go on for as long as somebody reads them."""
    clock = itertools.count(1000.0, 30.0)  # half a minute for each look at an entry
    monkeypatch.setattr(
        "ovr.kernel.types.live.time", SimpleNamespace(monotonic=lambda: next(clock))
    )
    link(memory, ITEMS[:4])
    assert list_keys(memory) == [0, 1, 2, 3]
    link(memory, ITEMS)
    with pytest.raises(GuestFault, match="a list has no end within 120 s") as caught:
        list_keys(memory)
    assert caught.value.hint
    root = TYPES.object("struct rb_root", memory, HEAD)
    memory.poke(HEAD, "Q", plant(memory, 0, 10))
    with pytest.raises(GuestFault, match="a red-black tree has no end within"):
        list(rbtree_for_each_entry("struct item", root, "rb"))
