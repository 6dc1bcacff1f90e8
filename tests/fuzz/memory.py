"""Targets: the native loops, on page tables and struct pages that hold anything.

Built with AddressSanitizer and UndefinedBehaviorSanitizer, and compared with plain Python.
"""

import os
import struct
from collections.abc import Iterator

import numpy as np

from ovr._fastcopy import OWNED, PAIR, RUN, RamMap, equal_pages
from ovr.errors import GuestFault
from ovr.memory.addresses import PAGE_SIZE, Gpa, Gva
from ovr.memory.paging import Frames, pieces
from tests.fuzz.target import Input, Target
from tests.sources import as_file
from tests.unit.reference_walk import PTE_ADDRESS, Leaf, reference_walk

__all__ = ["TARGETS"]

SLOTS = ((0, 12), (16, 4), (1 << 20, 3))
"""Frame number and size in frames of each slot; the rest of the address space is no RAM."""
FRAMES = [first + n for first, count in SLOTS for n in range(count)]
VMEMMAP = 0xFFFF_EA00_0000_0000
DIRTY = 1 << 6 | 1 << 58
"""The dirty bits of a page table entry."""
WIDEST = 1 << 9
"""Most pages that a walk is asked for: the reference takes its time."""


class Ram:
    """Guest RAM as `reference_walk` reads it, and as the native loops do; made once."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("ovr-fuzz")
        os.ftruncate(self._fd, PAGE_SIZE * len(FRAMES))
        slots, at = [], 0
        for first, count in SLOTS:
            slots.append((first * PAGE_SIZE, count * PAGE_SIZE, self._fd, at))
            at += count * PAGE_SIZE
        self.map = RamMap(slots, writable=True, unheld=True)
        self._place = {frame: n * PAGE_SIZE for n, frame in enumerate(FRAMES)}

    def fill(self, content: bytes) -> None:
        os.pwrite(self._fd, content.ljust(PAGE_SIZE * len(FRAMES), b"\0"), 0)

    def content(self) -> bytes:
        return os.pread(self._fd, PAGE_SIZE * len(FRAMES), 0)

    def read(self, gpa: Gpa, size: int) -> bytes:
        return b"".join(os.pread(self._fd, length, at) for at, length in self.parts(gpa, size))

    def parts(self, gpa: int, size: int) -> list[tuple[int, int]]:
        found = []
        while size:
            place = self._place.get(gpa // PAGE_SIZE)
            if place is None:
                raise GuestFault("not RAM", gpa)
            length = min(size, PAGE_SIZE - gpa % PAGE_SIZE)
            found.append((place + gpa % PAGE_SIZE, length))
            gpa, size = gpa + length, size - length
        return found


RAM = Ram()


def build(source: Input) -> bytes:
    """Page tables and anything else: words at places that the input names."""
    content = bytearray(PAGE_SIZE * len(FRAMES))
    for _ in range(source.number()):
        at, kind, value = source.number(2), source.number(), source.number(2)
        count = 1 + (kind >> 6) * 170
        for n in range(count):
            where = 8 * ((at + n) % (len(content) // 8))
            struct.pack_into("<Q", content, where, _entry(kind & 63, value + n * (kind & 1)))
    return bytes(content)


def _entry(kind: int, value: int) -> int:  # noqa: PLR0911 - one for each kind
    frame = FRAMES[(value >> 8) % len(FRAMES)]
    low = value & 0xFF | (value & 0x100)
    match kind >> 2:
        case 0:
            return value
        case 1:
            return (1 << 64) - 1 - value
        case 2:
            return value << 40 | low
        case 3:  # inverted, as of PROT_NONE pages
            return (~(frame << 12) & PTE_ADDRESS) | low & ~1 | 0x100
        case 4:
            return VMEMMAP + value | 1
        case 5:
            return 0xFFFF_FFFF_0000_0001 | value << 6
        case _:
            return frame << 12 | low | 1


def ranges(source: Input, levels: int) -> list[tuple[int, int]]:
    found, low = [], 0
    for _ in range(1 + source.number() % 4):
        shift = 12 + 9 * (source.number() % levels)
        start = low + (source.number() << shift) + (source.number() << 12)
        size = (1 + source.number(2) % WIDEST) << 12
        found.append((start, start + size))
        low = start + size
    if source.number() & 1:  # the upper half
        top = 1 << (11 + 9 * levels)
        found = [((1 << 64) - top + s, (1 << 64) - top + e) for s, e in found if e <= top]
    return [(s, e) for s, e in found if e <= 1 << 64]


def frames(source: Input, root: int, levels: int) -> Frames:
    stride = (64, 56, 8, 4096, 128)[source.number() % 5]
    places = [source.number() * 8 % max(stride - 7, 1) for _ in range(3)]
    mask = source.number(2)
    return Frames(
        root=Gpa(root), levels=levels, vmemmap=Gva(VMEMMAP + 8 * source.number(2)), stride=stride,
        flags=places[0], mapping=places[1], compound_head=places[2],
        page_mask=mask & 0xF, folio_mask=mask >> 4 & 0xF, folio_value=mask >> 8 & 0xF,
        mapping_mask=3, mapping_value=mask >> 12 & 3,
        dirty_mask=source.number() & 0x30, clean_mask=source.number() & 0xC0,
        clean_value=source.number() & 0xC0,
    )  # fmt: skip


def word(at: int) -> int:
    return int.from_bytes(RAM.read(Gpa(at), 8), "little")


def reference_translate(root: int, levels: int, gva: int) -> int:
    page = gva & ~(PAGE_SIZE - 1)
    sign = gva >> (11 + 9 * levels)
    if sign not in (0, (1 << (64 - 11 - 9 * levels)) - 1):
        raise GuestFault("not canonical", gva)
    table, level = root & PTE_ADDRESS, levels
    while True:
        RAM.read(Gpa(table), PAGE_SIZE)
        entry = word(table + 8 * (page >> (12 + 9 * (level - 1)) & 511))
        if not entry & 1:
            raise GuestFault("not mapped", gva)
        if level == 1 or (level <= 3 and entry & 0x80):
            mask = (1 << (12 + 9 * (level - 1))) - 1
            return (entry & PTE_ADDRESS & ~mask) + (gva & mask)
        table, level = entry & PTE_ADDRESS, level - 1


def reference_dirty(root: int, levels: int, gva: int) -> bool:
    """Whether the page table entry of a mapped page says that it is dirty."""
    table, level = root & PTE_ADDRESS, levels
    while True:
        entry = word(table + 8 * (gva >> (12 + 9 * (level - 1)) & 511))
        if level == 1 or not entry & 1 or (level <= 3 and entry & 0x80):
            return bool(entry & DIRTY)
        table, level = entry & PTE_ADDRESS, level - 1


def reference_owned(asked: Frames, pfn: int, dirty: bool) -> bool:
    """`RamMap._owned` in plain Python; a struct page must not cross a page of another frame."""
    try:
        page = _struct_page(asked, (asked.vmemmap + pfn * asked.stride) % (1 << 64))
        if word(page + asked.flags) & asked.page_mask != asked.page_mask:
            return False
        head = word(page + asked.compound_head)
        if head & 1:
            if head >> 32 == 0xFFFF_FFFF:
                head &= (asked.vmemmap + pfn * asked.stride) % (1 << 64)
            page = _struct_page(asked, head & ~1)
        flags = word(page + asked.flags)
        kept = dirty or flags & asked.dirty_mask or (
            asked.clean_mask and flags & asked.clean_mask == asked.clean_value
        )  # fmt: skip
        folio = flags & asked.folio_mask == asked.folio_value
        mapping = word(page + asked.mapping) & asked.mapping_mask == asked.mapping_value
        return bool(folio and mapping and kept)
    except GuestFault:
        return False


def _struct_page(asked: Frames, gva: int) -> int:
    if gva & 7:
        raise GuestFault("unaligned", gva)
    gpa = reference_translate(asked.root, asked.levels, gva)
    last = reference_translate(asked.root, asked.levels, gva + asked.stride - 1)
    if last != gpa + asked.stride - 1 or _leaf_end(asked, gva) < gva + asked.stride:
        raise GuestFault("cut in two", gva)
    RAM.read(Gpa(gpa), asked.stride)
    if _slot(gpa) != _slot(last):
        raise GuestFault("in two slots", gva)
    return gpa


def _slot(gpa: int) -> int:
    return next(first for first, count in SLOTS if 0 <= gpa // PAGE_SIZE - first < count)


def _leaf_end(asked: Frames, gva: int) -> int:
    table, level = asked.root & PTE_ADDRESS, asked.levels
    while True:
        shift = 12 + 9 * (level - 1)
        entry = word(table + 8 * (gva >> shift & 511))
        if level == 1 or (level <= 3 and entry & 0x80):
            return (gva >> shift) + 1 << shift
        table, level = entry & PTE_ADDRESS, level - 1


def merged(leaves: Iterator[Leaf]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for leaf in leaves:
        if found:
            gva, gpa, size, flags, shift = found[-1]
            near = (gva + size, gpa + size, flags, shift)
            if near == (leaf.gva, leaf.gpa, leaf.flags, leaf.page_shift):
                found[-1] = (gva, gpa, size + leaf.size, flags, shift)
                continue
        found.append(tuple(leaf))
    return found


def paging(data: bytes) -> None:
    """Walk, translate and copy; all of it must be as in the reference, and nothing else change."""
    source = Input(data)
    shape = source.number()
    levels = 4 + (shape & 1)
    root = FRAMES[source.number() % len(FRAMES)] * PAGE_SIZE + (shape >> 4)
    asked = ranges(source, levels)
    described = frames(source, root, levels)
    RAM.fill(build(source))
    runs = _same_walk(asked, root, levels, described if shape & 2 else None)
    for start, end in asked:
        _same_translation(root, levels, start)
        _same_translation(root, levels, end - 1 & ~7 | shape >> 5)
    if runs is not None and shape & 4:
        _copy(runs)


def _same_walk(asked, root, levels, described):
    try:
        expected = merged(reference_walk(RAM, Gpa(root & PTE_ADDRESS), levels, asked))
    except GuestFault:
        expected = None
    wanted = pieces((start, end - start, start % (1 << 20)) for start, end in asked)
    try:
        found = RAM.map.walk(root, levels, wanted, described)
    except GuestFault:
        _canonical = all(e <= 1 << (11 + 9 * levels) or s >> 63 for s, e in asked)
        assert expected is None or not _canonical, "a fault that the reference does not see"
        return None
    assert expected is not None, "the reference sees a fault"
    _same_runs(found, expected, described, (root, levels))
    return found


def _same_runs(found, expected, described, tables):
    # Pages that are owned and others are runs of their own, and so are those of other pieces.
    pages = [
        (gva + at, gpa + at, flags, shift)
        for gva, gpa, size, flags, shift in expected
        for at in range(0, size, PAGE_SIZE)
    ]
    at = 0
    for gva, gpa, size, _, flags, shift in found.tolist():
        for here in range(0, size, PAGE_SIZE):
            assert pages[at] == (gva + here, gpa + here, flags & ~OWNED, shift)
            at += 1
        for here in range(0, min(size, 4 * PAGE_SIZE) if described else 0, PAGE_SIZE):
            frame = (gpa + here & ~((1 << shift) - 1)) >> 12
            dirty = reference_dirty(*tables, gva + here)
            assert bool(flags & OWNED) == reference_owned(described, frame, dirty)
    assert at == len(pages)


def _same_translation(root, levels, gva):
    try:
        expected = reference_translate(root, levels, gva)
    except GuestFault:
        expected = None
    try:
        found = RAM.map.translate(root, levels, gva)
    except GuestFault:
        found = None
    assert found == expected


def _copy(runs):
    """A copy writes its runs and nothing else, or is refused and writes nothing."""
    before = RAM.content()
    runs = runs[:64].copy()
    runs["size"] = np.minimum(runs["size"], 4 * PAGE_SIZE)
    runs["offset"] = np.arange(len(runs)) * 100
    source = bytes(range(256)) * 128
    try:
        RAM.map.copy_in(runs, *as_file(source))
    except GuestFault:
        assert RAM.content() == before
        return
    after = bytearray(before)
    for _, gpa, size, offset, *_ in runs.tolist():
        done = 0
        for at, length in RAM.parts(gpa, size):
            after[at : at + length] = source[offset + done : offset + done + length]
            done += length
    assert RAM.content() == bytes(after)


def owned_seeds() -> Iterator[bytes]:
    """A user's page that is frame 8, and its struct page with a head here and there."""

    def entry(frame: int, index: int, kind: int, value: int) -> bytes:
        return struct.pack("<HBH", 512 * frame + index, kind, value)

    tables = [entry(table, 0, 0x18, (table + 1) << 8 | 0x67) for table in range(3)]
    tables += [entry(0, 468, 0x18, 0x167), entry(3, 0, 0x18, 0x467), entry(3, 8, 0x18, 0x867)]
    for head in (0, 8 * 64, 9 * 64, 8 * 64 + 62, 63 * 64 + 32):
        page = [entry(4, 8 * n + at, 0, 1) for n in (8, 9) for at in (0, 3)]
        page.append(entry(4, 74, 8, 0x100))  # what a head that is not aligned has for its mapping
        records = [*tables, *page, entry(4, 8 * 8 + 1, 0x10 if head else 0, head)]
        ranges_ = bytes([0, 0, 0, 0]) + struct.pack("<H", 15) + b"\0"
        described = bytes([0, 0, 3, 1]) + struct.pack("<HH", 1 | 1 << 12, 0)
        yield bytes([2, 0]) + ranges_ + described + bytes([len(records)]) + b"".join(records)


def paging_seeds() -> Iterator[bytes]:
    yield from owned_seeds()
    for shape in range(8):
        for kind in (0xFF, 0x3F, 0xE0, 0xD0):
            # four tables that lead to each other, in the first frames
            tables = [bytes([0, n << 1, kind, 0x67, n + 1]) for n in range(6)]
            head = bytes([shape, 0, 0, 0, 0, 0, 16, 0, 0]) + bytes([0, 0, 3, 1, 0, 0, 0, 0])
            yield head + bytes([6]) + b"".join(tables)


# ---- lists of runs and pairs -------------------------------------------------------------


def lists(data: bytes) -> None:
    """Runs and pairs that hold anything: refused, or done within bounds."""
    source = Input(data)
    kind = source.number()
    content = bytes(range(256)) * (16 * (1 + kind % 5))
    dtype = PAIR if kind & 1 else RUN
    raw = source.rest()
    rows = np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype)
    RAM.fill(content)
    if kind & 1:
        _same_pages(content, content[4096:] + content[:4096], rows)
        return
    before = RAM.content()
    RAM.map.prefault(rows)
    try:
        RAM.map.copy_in(rows, *as_file(content))
        assert RAM.map.first_difference(rows[-1:], content) is None
    except (GuestFault, ValueError):
        assert RAM.content() == before
        raise


def _same_pages(one: bytes, other: bytes, rows):
    found = equal_pages(one, other, rows).tolist()
    assert found == [
        one[a + at : a + at + 4096] == other[b + at : b + at + 4096]
        for a, b, size in rows.tolist()
        for at in range(0, size, 4096)
    ]


def lists_seeds() -> Iterator[bytes]:
    for kind in range(10):
        pair = np.array([(0, 4096, 8192), (4096, 0, 4096)], PAIR).tobytes()
        runs = [(0x1000, 0x1000, 4096, 0, 0, 12), (0x9000, 0xB000, 4096, 64, 0, 12)]
        yield bytes([kind]) + (pair if kind & 1 else np.array(runs, RUN).tobytes())


TARGETS = (
    Target("paging", paging_seeds, paging, native=True),
    Target("lists", lists_seeds, lists, (ValueError,), native=True),
)
