"""The native walk against the reference, on hand-made page tables, good and bad."""

import struct
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovr._fastcopy import OWNED, PROTNONE, SOFT_DIRTY, USER, WRITE
from ovr.errors import GuestFault
from ovr.memory.addresses import PAGE_SIZE, Gpa, Gva
from ovr.memory.paging import AddressSpace, Frames, pieces
from tests.unit.machine import Machine, canonical
from tests.unit.reference_walk import PTE_PRESENT, PTE_PSE, PTE_RW, PTE_USER, Leaf, reference_walk

GIB = 1 << 30
MIB2 = 1 << 21


def merged(leaves):
    """Join runs as `walk` does: neighbours in both spaces with the same flags are one run."""
    runs = []
    for leaf in leaves:
        if runs:
            gva, gpa, size, flags, shift = runs[-1]
            if (
                gva + size == leaf.gva
                and gpa + size == leaf.gpa
                and (flags, shift) == (leaf.flags, leaf.page_shift)
            ):
                runs[-1] = Leaf(gva, gpa, size + leaf.size, flags, shift)
                continue
        runs.append(leaf)
    return runs


def native(space, ranges, frames=None):
    found = space.walk(
        pieces((start, end - start, start - ranges[0][0]) for start, end in ranges), frames
    )
    return [
        Leaf(int(r["gva"]), int(r["gpa"]), int(r["size"]), int(r["flags"]), int(r["page_shift"]))
        for r in found
    ]


@pytest.fixture(params=[4, 5])
def machine(request, tmp_path):
    machine = Machine.build(tmp_path, levels=request.param, sizes=(4 << 20, 4 << 20))
    yield machine
    machine.ram.close()


def test_one_page_of_each_size(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    machine.map(0x7F00_0000_1000, 0x5000)
    machine.map(0x7F00_0020_0000, 4 * MIB2, shift=21)
    machine.map(0x7F80_0000_0000, GIB, shift=30, flags=0)
    assert space.translate(Gva(0x7F00_0000_1234)) == 0x5234
    assert space.translate(Gva(0x7F00_0020_1234)) == 4 * MIB2 + 0x1234
    assert space.translate(Gva(0x7F80_1234_5678)) == GIB + 0x1234_5678
    assert native(space, [(0x7F80_0000_1000, 0x7F80_0000_3000)]) == [
        Leaf(0x7F80_0000_1000, GIB + 0x1000, 0x2000, 0, 30)
    ]
    with pytest.raises(GuestFault):
        space.translate(Gva(0x7F00_0000_2000))


def test_runs_carry_the_source_offset(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    for page in (0, 1, 3):
        machine.map(0x1000_0000 + page * PAGE_SIZE, 0x10000 + page * PAGE_SIZE)
    runs = space.walk(pieces([(0x1000_0000, 4 * PAGE_SIZE, 777)]))
    assert runs["offset"].tolist() == [777, 777 + 3 * PAGE_SIZE]
    assert runs["size"].tolist() == [2 * PAGE_SIZE, PAGE_SIZE]


def test_neighbours_with_foreign_offsets_do_not_merge(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    machine.map(0x1000_0000, 0x10000)
    machine.map(0x1000_1000, 0x11000)
    runs = space.walk(
        pieces([(0x1000_0000, PAGE_SIZE, 0), (0x1000_1000, PAGE_SIZE, 9 * PAGE_SIZE)])
    )
    assert runs["offset"].tolist() == [0, 9 * PAGE_SIZE]


def test_protnone_entries_are_inverted(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    machine.map(0x2000_0000, 0x7000, protnone=True)
    assert native(space, [(0x2000_0000, 0x2000_1000)]) == [
        Leaf(0x2000_0000, 0x7000, PAGE_SIZE, PROTNONE, 12)
    ]
    with pytest.raises(GuestFault):
        space.translate(Gva(0x2000_0000))


def test_the_last_page_of_the_address_space(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    top = canonical(-PAGE_SIZE, machine.levels)
    machine.map(top, 0x9000, flags=0)
    assert native(space, [(top, top + PAGE_SIZE)]) == [Leaf(top, 0x9000, PAGE_SIZE, 0, 12)]
    machine.ram.write(Gpa(0x9FF8), b"the end!")
    assert space.read(Gva(top + 0xFF8), 8) == b"the end!"
    with pytest.raises(GuestFault):
        space.read(Gva(top + 0xFF8), 9)


@pytest.mark.parametrize("gva", [0x8000_0000_0000 << 9, -1, 1 << 64])
def test_addresses_that_cannot_be(machine, gva):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    with pytest.raises(GuestFault):
        space.translate(gva)
    with pytest.raises(GuestFault):
        space.read(gva, 5000)


def test_a_table_outside_of_ram(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    machine.map(0x1000, 0x5000)
    machine.set_entry(machine.tables[1], 0, 0xDEAD_0000_0000 | PTE_PRESENT)
    with pytest.raises(GuestFault, match="page table"):
        native(space, [(0, MIB2)])
    with pytest.raises(GuestFault):
        space.translate(Gva(0x1000))
    with pytest.raises(GuestFault):
        list(reference_walk(machine.ram, machine.root, machine.levels, [(0, MIB2)]))


def test_a_huge_bit_where_none_may_be(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    machine.set_entry(machine.root, 0, 0x5000 | PTE_PRESENT | PTE_PSE)
    with pytest.raises(GuestFault):
        native(space, [(0, MIB2)])
    with pytest.raises(GuestFault):
        list(reference_walk(machine.ram, machine.root, machine.levels, [(0, MIB2)]))


def test_tables_that_point_to_themselves_end(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    for index in range(512):
        machine.set_entry(machine.root, index, machine.root | PTE_PRESENT)
    runs = native(space, [(0, 64 * MIB2)])
    assert runs == merged(
        reference_walk(machine.ram, machine.root, machine.levels, [(0, 64 * MIB2)])
    )


def test_tables_that_lead_to_themselves_have_runs_without_end(machine):
    """Each 4 KiB of 128 TiB of addresses, on the same few frames."""
    table = machine.new_table()
    for index in range(512):
        machine.set_entry(table, index, table | PTE_PRESENT)
    for index in range(256):
        machine.set_entry(machine.root, index, table | PTE_PRESENT)
    ours = AddressSpace(machine.ram, machine.root, machine.levels)
    assert len(ours.walk(pieces([(0, 1 << 30, 0)]))) == 1 << 18
    with pytest.raises(GuestFault):
        ours.walk(pieces([(0, 1 << 47, 0)]))


def test_read_and_write_across_pages(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    machine.map(0x4000_0000, 0x20000)
    machine.map(0x4000_1000, 0x31000)
    data = bytes(range(200))
    space.write(Gva(0x4000_0FA0), data)
    assert space.read(Gva(0x4000_0FA0), 200) == data
    assert machine.ram.read(Gpa(0x20FA0), 0x60) == data[:0x60]
    assert machine.ram.read(Gpa(0x31000), 200 - 0x60) == data[0x60:]


def test_a_read_of_more_than_can_be_meant(machine, monkeypatch):
    """One frame can be mapped everywhere: what is there does not limit what is read."""
    monkeypatch.setattr("ovr.memory.paging.MAX_READ", 8192)
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    for page in range(4):
        machine.map(0x4000_0000 + page * PAGE_SIZE, 0x20000)
    assert len(space.read(Gva(0x4000_0000), 8192)) == 8192
    with pytest.raises(GuestFault, match="too many for one read"):
        space.read(Gva(0x4000_0000), 8193)


def test_a_write_that_would_fault_writes_nothing(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    machine.map(0x4000_0000, 0x20000)
    with pytest.raises(GuestFault):
        space.write(Gva(0x4000_0FF0), bytes([255]) * 32)
    assert machine.ram.read(Gpa(0x20FF0), 16) == bytes(16)


VMEMMAP, STRIDE = 0xFFFF_EA00_0000_0000, 64
PG_ANON_EXCLUSIVE = 1 << 17
LOCKED, UPTODATE = 1 << 0, 1 << 4
DIRTY, SWAPCACHE, SWAPBACKED = 1 << 5, 1 << 10, 1 << 18
PTE_DIRTY, PTE_SAVED_DIRTY = 1 << 6, 1 << 58
PTE_SOFT_DIRTY = 1 << 11


def frames_of(machine):
    return Frames(
        root=machine.root,
        levels=machine.levels,
        vmemmap=Gva(VMEMMAP),
        stride=STRIDE,
        flags=0,
        mapping=24,
        compound_head=8,
        page_mask=PG_ANON_EXCLUSIVE,
        folio_mask=0,
        folio_value=0,
        mapping_mask=3,
        mapping_value=1,
        dirty_mask=DIRTY,
        clean_mask=SWAPBACKED | SWAPCACHE,
        clean_value=SWAPBACKED,
    )


def set_page(machine, pfn, *, flags=0, mapping=0, head=0):
    gpa = 0x30_0000 + pfn * STRIDE
    machine.ram.write(Gpa(gpa), struct.pack("<QQQQ", flags, head, 0, mapping))


@pytest.mark.parametrize(
    ("flags", "mapping", "mine"),
    [
        (PG_ANON_EXCLUSIVE, 0xFFFF_8880_0000_0001, True),
        (0, 0xFFFF_8880_0000_0001, False),  # shared with a child
        (
            PG_ANON_EXCLUSIVE,
            0xFFFF_8880_0000_0000,
            False,
        ),  # page cache: the bit means another thing
        (PG_ANON_EXCLUSIVE, 0xFFFF_8880_0000_0003, False),  # KSM
    ],
)
def test_only_exclusive_anonymous_pages_are_the_tasks_own(machine, flags, mapping, mine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    machine.map(VMEMMAP, 0x30_0000)
    machine.map(0x5000_0000, 0x7000)
    set_page(machine, 7, flags=flags | SWAPBACKED, mapping=mapping)
    [leaf] = native(space, [(0x5000_0000, 0x5000_1000)], frames_of(machine))
    assert leaf.flags == WRITE | USER | (OWNED if mine else 0)


@pytest.mark.parametrize("pages", ["small", "huge", "PROT_NONE"])
@pytest.mark.parametrize(
    ("entry", "folio", "kept"),
    [
        pytest.param(0, SWAPBACKED, True, id="no copy in swap yet"),
        pytest.param(0, SWAPBACKED | SWAPCACHE, False, id="read from swap"),
        pytest.param(PTE_DIRTY, SWAPBACKED | SWAPCACHE, True, id="written since"),
        pytest.param(PTE_SAVED_DIRTY, SWAPBACKED | SWAPCACHE, True, id="written, now read-only"),
        pytest.param(0, SWAPBACKED | SWAPCACHE | DIRTY, True, id="about to be written to swap"),
        pytest.param(0, 0, False, id="MADV_FREE"),
        pytest.param(PTE_DIRTY, 0, True, id="MADV_FREE, written since"),
        pytest.param(0, SWAPCACHE, False, id="the bit means another thing without swap"),
    ],
)
def test_a_page_that_reclaim_would_drop_is_not_written_to(machine, entry, folio, kept, pages):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    for at in range(0, 16 * PAGE_SIZE, PAGE_SIZE):
        machine.map(VMEMMAP + at, 0x30_0000 + at)
    number = 512 if pages == "huge" else 7
    machine.map(
        0x5000_0000, number << 12, shift=21 if pages == "huge" else 12,
        flags=PTE_RW | PTE_USER | entry, protnone=pages == "PROT_NONE",
    )  # fmt: skip
    set_page(machine, number, flags=PG_ANON_EXCLUSIVE | folio, mapping=0xFFFF_8880_0000_0001)
    [leaf] = native(space, [(0x5000_0000, 0x5000_1000)], frames_of(machine))
    assert bool(leaf.flags & OWNED) == kept


@pytest.mark.parametrize("pages", ["small", "huge", "PROT_NONE"])
def test_soft_dirty_pages_are_told_apart_on_request(machine, pages):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    size, shift = (MIB2, 21) if pages == "huge" else (PAGE_SIZE, 12)
    for number, bit in enumerate((0, PTE_SOFT_DIRTY, 0)):
        machine.map(
            0x5000_0000 + number * size, number * size, shift=shift,
            flags=PTE_RW | PTE_USER | bit, protnone=pages == "PROT_NONE",
        )  # fmt: skip
    whole = pieces([(0x5000_0000, 3 * size, 0)])
    assert len(space.walk(whole)) == 1
    runs = space.walk(whole, soft_dirty=True)
    assert (runs["flags"] & SOFT_DIRTY).tolist() == [0, SOFT_DIRTY, 0]
    assert runs["size"].tolist() == [size] * 3


def test_the_mapping_of_a_tail_page_is_in_its_head(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    machine.map(VMEMMAP, 0x30_0000)
    machine.map(0x5000_0000, 0x7000)
    set_page(machine, 4, flags=SWAPBACKED, mapping=0xFFFF_8880_0000_0001)
    set_page(machine, 7, flags=PG_ANON_EXCLUSIVE, head=VMEMMAP + 4 * STRIDE + 1)
    [leaf] = native(space, [(0x5000_0000, 0x5000_1000)], frames_of(machine))
    assert leaf.flags & OWNED
    # As a mask (compound_info): frames 4 to 7 have their head at a multiple of 4 pages.
    set_page(machine, 7, flags=PG_ANON_EXCLUSIVE, head=-4 * STRIDE + 1 & (1 << 64) - 1)
    [leaf] = native(space, [(0x5000_0000, 0x5000_1000)], frames_of(machine))
    assert leaf.flags & OWNED
    set_page(machine, 7, flags=PG_ANON_EXCLUSIVE, head=0x1234_5678_9ABC_DEF1)
    [leaf] = native(space, [(0x5000_0000, 0x5000_1000)], frames_of(machine))
    assert not leaf.flags & OWNED


@pytest.mark.parametrize(
    ("flags", "mapping", "mine"),
    [
        (UPTODATE | DIRTY, 0xFFFF_8880_0000_1000, True),
        (UPTODATE | DIRTY | 1 << 17, 0xFFFF_8880_0000_1000, True),
        (UPTODATE, 0xFFFF_8880_0000_1000, False),  # a hole that was read
        (UPTODATE | SWAPBACKED, 0xFFFF_8880_0000_1000, False),
        (UPTODATE | DIRTY | LOCKED, 0xFFFF_8880_0000_1000, False),  # about to be moved
        (DIRTY, 0xFFFF_8880_0000_1000, False),  # not filled yet
        (UPTODATE | DIRTY, 0xFFFF_8880_0000_2000, False),  # another object's
        (UPTODATE | DIRTY, 0xFFFF_8880_0000_1001, False),  # anonymous
        (UPTODATE | DIRTY, 0, False),  # truncated
    ],
)
def test_pages_of_a_shared_object(machine, flags, mapping, mine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    machine.map(VMEMMAP, 0x30_0000)
    machine.map(0x5000_0000, 0x7000)
    set_page(machine, 7, flags=flags, mapping=mapping)
    frames = replace(
        frames_of(machine), page_mask=0, folio_mask=UPTODATE | LOCKED, folio_value=UPTODATE,
        mapping_mask=(1 << 64) - 1, mapping_value=0xFFFF_8880_0000_1000, clean_mask=0,
        clean_value=0,
    )  # fmt: skip
    [leaf] = native(space, [(0x5000_0000, 0x5000_1000)], frames)
    assert leaf.flags == WRITE | USER | (OWNED if mine else 0)


def test_a_struct_page_that_is_not_mapped_is_nobodys(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    machine.map(0x5000_0000, 0x7000)
    [leaf] = native(space, [(0x5000_0000, 0x5000_1000)], frames_of(machine))
    assert not leaf.flags & OWNED


def test_a_head_that_is_not_aligned_is_no_struct_page(machine):
    """Found by fuzzing: it was not refused where a piece of the array was translated before."""
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    machine.map(VMEMMAP, 0x30_0000)
    machine.map(0x5000_0000, 0x7000)
    set_page(machine, 7, flags=PG_ANON_EXCLUSIVE, head=VMEMMAP + 9 * STRIDE + 5)
    machine.ram.write(Gpa(0x30_0000 + 9 * STRIDE + 4 + 24), b"\1")
    [leaf] = native(space, [(0x5000_0000, 0x5000_1000)], frames_of(machine))
    assert not leaf.flags & OWNED


layouts = st.lists(
    st.tuples(
        st.integers(0, 2047),  # where, in 4 KiB steps (or in huge steps for huge pages)
        st.integers(0, 3000),  # frame
        st.sampled_from([12, 12, 12, 21]),
        st.booleans(),  # protnone
        st.sampled_from([0, 2, 4, 6]),
    ),
    max_size=60,
)
cuts = st.lists(st.integers(0, 2048), min_size=2, max_size=6, unique=True)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts, cut=cuts, top=st.booleans(), levels=st.sampled_from([4, 5]))
def test_walk_agrees_with_the_reference(tmp_path_factory, layout, cut, top, levels):
    machine = Machine.build(tmp_path_factory.mktemp("ram"), levels=levels, sizes=(4 << 20,))
    base = canonical(-(8 << 20), levels) if top else 0x7FFF_FF00_0000
    small, huge = set(), set()
    for where, frame, shift, protnone, flags in layout:
        block = where // 512
        if shift == 21 and block not in small:
            huge.add(block)
            machine.map(base + block * MIB2, frame * MIB2, shift=21, flags=flags, protnone=protnone)
        elif shift == 12 and block not in huge:
            small.add(block)
            machine.map(base + where * PAGE_SIZE, frame * PAGE_SIZE, flags=flags, protnone=protnone)
    cut = sorted(cut)
    ranges = [
        (base + a * PAGE_SIZE, base + b * PAGE_SIZE)
        for a, b in zip(cut[::2], cut[1::2], strict=False)
    ]
    space = AddressSpace(machine.ram, machine.root, levels)
    expected = merged(reference_walk(machine.ram, machine.root, levels, ranges))
    assert native(space, ranges) == expected
    machine.ram.close()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), small=st.booleans(), gva=st.integers(0, (1 << 64) - 1))
def test_noise_as_page_tables_never_crashes(tmp_path_factory, seed, small, gva):
    machine = Machine.build(tmp_path_factory.mktemp("ram"), sizes=(1 << 20,))
    noise = np.random.default_rng(seed).integers(0, 1 << 64, 512, dtype=np.uint64)
    if small:  # mostly inside of RAM, so that the walks get further
        noise &= np.uint64(0xFFFFF)
    noise = noise.tobytes()
    for table in range(0, 1 << 20, PAGE_SIZE):
        machine.ram.write(Gpa(table), noise)
    space = AddressSpace(machine.ram, machine.root, 4)
    with suppress(GuestFault):
        space.translate(Gva(gva))
    start = 0x1000_0000
    outcome = []
    for walk in (
        lambda: native(space, [(start, start + 8 * MIB2)]),
        lambda: merged(reference_walk(machine.ram, machine.root, 4, [(start, start + 8 * MIB2)])),
    ):
        try:
            outcome.append(walk())
        except GuestFault:
            outcome.append("fault")
    assert outcome[0] == outcome[1]
    machine.ram.close()


def test_pieces_must_be_whole_pages(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    for piece in ((1, PAGE_SIZE, 0), (0, 100, 0), (0, 0, 0)):
        with pytest.raises(ValueError, match="whole pages"):
            space.walk(pieces([piece]))
    with pytest.raises(GuestFault, match="canonical"):
        hole = 1 << (11 + 9 * machine.levels)
        space.walk(pieces([(hole - PAGE_SIZE, 2 * PAGE_SIZE, 0)]))


def test_levels(machine):
    with pytest.raises(ValueError, match="4 or 5"):
        AddressSpace(machine.ram, machine.root, 3)


def test_empty_walk(machine):
    space = AddressSpace(machine.ram, machine.root, machine.levels)
    assert len(space.walk(pieces([]))) == 0
    assert space.read(Gva(0), 0) == b""
    assert np.array_equal(space.walk(pieces([(0, PAGE_SIZE, 0)])), space.walk(pieces([])))
