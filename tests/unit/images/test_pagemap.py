import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovr.errors import ImagesDamaged, ImagesUnsupported
from ovr.images.chain import covered, resolve
from ovr.images.framing import Frame, encode, image_bytes
from ovr.images.messages import PagemapEntry, PagemapHead
from ovr.images.pagemap import (
    PAGEMAP_DTYPE,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    Pagemap,
    check_pages_size,
    decode_pagemap,
    encode_pagemap,
)
from ovr.memory.extents import cut_to, ends_of, total

NAME = "pagemap-5.img"
FLAGS = st.sampled_from([PE_PRESENT, PE_PRESENT | PE_LAZY, PE_PARENT, PE_PARENT | PE_LAZY])
RUNS = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300), FLAGS), max_size=40)


def image(entries, pages_id=3):
    """A pagemap image made of messages, one at a time, as CRIU does it."""
    messages = [PagemapHead(pages_id=pages_id), *entries]
    return image_bytes(NAME, [Frame(m.SerializePartialToString()) for m in messages])


def array(runs, base=0x7F0000000000):
    """Entries from (gap, pages, flags), gap and size in pages."""
    rows, at = [], base
    for gap, pages, flags in runs:
        at += gap * 4096
        rows.append((at, pages * 4096, flags, 0, 0))
        at += pages * 4096
    return np.array(rows, PAGEMAP_DTYPE)


def reference(entries):
    """criu.md 1.3, one entry at a time: GVA, size, flags, offset."""
    offset = 0
    for e in entries:
        flags = e.flags
        if e.HasField("in_parent") and e.in_parent:
            flags |= PE_PARENT
        elif not e.HasField("flags"):
            flags = PE_PRESENT
        pages = e.nr_pages if e.HasField("nr_pages") else e.compat_nr_pages
        yield e.vaddr, pages * 4096, flags, offset if flags & PE_PRESENT else -1
        if flags & PE_PRESENT:
            offset += pages * 4096


def decoded(pagemap):
    return pagemap.entries[["gva", "size", "flags", "offset"]].tolist()


@given(RUNS, st.data())
def test_decode_agrees_with_the_reference_loop(runs, data):
    messages = []
    for gva, size, flags in array(runs)[["gva", "size", "flags"]].tolist():
        pages = size // 4096
        e = PagemapEntry(vaddr=gva, compat_nr_pages=pages)
        style = data.draw(st.sampled_from(["flags", "old", "modern"]))
        if style == "modern":
            e.compat_nr_pages, e.nr_pages = 0, pages
        if style == "old" and flags & PE_PARENT:
            e.in_parent = True
        elif style != "old":
            e.flags = flags
        messages.append(e)
    pagemap = decode_pagemap(image(messages), NAME)
    assert pagemap.pages_id == 3
    assert decoded(pagemap) == list(reference(messages))


@given(RUNS, st.booleans())
def test_encode_round_trip(runs, compat):
    entries = array(runs)
    again = decode_pagemap(encode_pagemap(Pagemap(9, entries, compat), NAME), NAME)
    assert again.pages_id == 9
    assert again.compat == (compat or not runs)
    for field in ("gva", "size", "flags"):
        assert np.array_equal(again.entries[field], entries[field])
    assert not again.entries.flags.writeable


@given(RUNS, st.integers(0), st.binary(min_size=1, max_size=9))
def test_damaged_bytes_give_our_errors_only(runs, where, patch):
    data = bytearray(encode_pagemap(Pagemap(9, array(runs), True), NAME))
    where %= len(data)
    data[where : where + len(patch)] = patch
    try:
        pagemap = decode_pagemap(bytes(data), NAME)
    except (ImagesDamaged, ImagesUnsupported) as error:
        assert NAME in str(error) and error.hint and "\n" not in str(error)
        return
    ends = ends_of(pagemap.entries)
    assert (ends[:-1] <= pagemap.entries["gva"][1:]).all()
    assert (ends > pagemap.entries["gva"]).all()


@given(RUNS, st.integers(1, 60))
def test_every_cut_is_found_or_loses_whole_entries(runs, cut):
    data = encode_pagemap(Pagemap(9, array(runs), False), NAME)
    try:
        pagemap = decode_pagemap(data[:-cut], NAME)
    except ImagesDamaged:
        return
    whole = encode_pagemap(Pagemap(9, array(runs)[: len(pagemap.entries)], False), NAME)
    assert whole == data[:-cut]


@pytest.mark.parametrize(
    ("entry", "error", "text"),
    [
        (
            {"vaddr": 0x1001, "compat_nr_pages": 1},
            ImagesDamaged,
            "impossible run of pages at 0x1001",
        ),
        ({"vaddr": 1 << 56, "compat_nr_pages": 1}, ImagesDamaged, "impossible"),
        ({"vaddr": 0xFFFFFFFFFFFFF000, "compat_nr_pages": 2}, ImagesDamaged, "impossible"),
        (
            {"vaddr": 0, "compat_nr_pages": 0, "nr_pages": (1 << 44) + 1},
            ImagesDamaged,
            "impossible",
        ),
        ({"vaddr": 0, "compat_nr_pages": 0, "nr_pages": 1 << 52}, ImagesDamaged, "impossible"),
        ({"vaddr": 0x1000}, ImagesDamaged, "without address or number"),
        ({"compat_nr_pages": 1}, ImagesDamaged, "without address or number"),
        ({"vaddr": 0x1000, "compat_nr_pages": 1, "flags": 2}, ImagesUnsupported, "in no image"),
        ({"vaddr": 0x1000, "compat_nr_pages": 1, "flags": 0}, ImagesUnsupported, "in no image"),
        ({"vaddr": 0x1000, "compat_nr_pages": 1, "flags": 12}, ImagesUnsupported, "unknown flags"),
        ({"vaddr": 0x1000, "compat_nr_pages": 1, "flags": 5}, ImagesUnsupported, "unknown flags"),
    ],
)
def test_refusals(entry, error, text):
    good = PagemapEntry(vaddr=0x2000, compat_nr_pages=1)
    with pytest.raises(error, match=text):
        decode_pagemap(image([PagemapEntry(**entry)]), NAME)
    with pytest.raises(error):
        decode_pagemap(image([PagemapEntry(**entry), good]), NAME)


def test_overlap_and_order():
    low, high = (PagemapEntry(vaddr=v, compat_nr_pages=2) for v in (0x1000, 0x2000))
    for entries in ([low, high], [high, low]):
        with pytest.raises(ImagesDamaged, match="not above the one before"):
            decode_pagemap(image(entries), NAME)


def test_fields_of_a_newer_criu_are_refused():
    head = encode(PagemapHead(pages_id=1))
    for extra in (b"\x30\x05", b"\x32\x01\x00", b"\x32" + b"\xc8\x01" + bytes(200)):
        newer = Frame(PagemapEntry(vaddr=0x1000, compat_nr_pages=1).SerializeToString() + extra)
        with pytest.raises(ImagesUnsupported, match="field that CRIU"):
            decode_pagemap(image_bytes(NAME, [head, newer]), NAME)
    long = Frame(PagemapEntry(vaddr=0x1000, compat_nr_pages=1).SerializeToString() + bytes(300))
    with pytest.raises(ImagesUnsupported, match="too long"):
        decode_pagemap(image_bytes(NAME, [head, long]), NAME)


def test_bad_varints():
    head = encode(PagemapHead(pages_id=1))
    for payload in (b"\x08" + b"\x80" * 11, b"\x08\x80", b"\x08", b"\x80" * 20):
        with pytest.raises(ImagesDamaged, match="not protobuf"):
            decode_pagemap(image_bytes(NAME, [head, Frame(payload)]), NAME)


def test_pages_image_too_short_names_both_sizes():
    pagemap = decode_pagemap(image([PagemapEntry(vaddr=0x1000, compat_nr_pages=3)]), NAME)
    check_pages_size(pagemap, 3 * 4096, "pages-3.img")
    with pytest.raises(ImagesDamaged, match=r"pages-3.img: 12288 bytes needed, 12287 present"):
        check_pages_size(pagemap, 3 * 4096 - 1, "pages-3.img")


def test_a_million_entries_are_decoded_in_bulk():
    count = 1_310_720  # every other page of 10 GiB
    entries = np.zeros(count, PAGEMAP_DTYPE)
    entries["gva"] = (np.arange(count, dtype=np.uint64) << 13) + (0x7F0000000000)
    row = PagemapEntry(
        vaddr=0x7F0000000000, compat_nr_pages=1, flags=PE_PRESENT
    ).SerializeToString()
    frame = np.frombuffer(len(row).to_bytes(4, "little") + row, np.uint8)
    rows = np.tile(frame, (count, 1))
    for i in range(7):  # the seven bytes of the address varint
        rows[:, 5 + i] = (entries["gva"] >> (7 * i)).astype(np.uint8) & 0x7F | (
            0x80 if i < 6 else 0
        )
    data = image([]) + rows.tobytes()
    calls = 0

    def count_call(_frame, event, _argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count_call)
    try:
        pagemap = decode_pagemap(data, NAME)
    finally:
        sys.setprofile(None)
    assert calls < 10_000
    assert np.array_equal(pagemap.entries["gva"], entries["gva"])
    assert np.array_equal(pagemap.entries["offset"], np.arange(count) * 4096)


def pages_of(entries):
    """Page address -> (level, offset or None), one page at a time."""
    return {
        gva + at: (level, offset + at if flags & PE_PRESENT else None)
        for gva, size, flags, level, offset in entries.tolist()
        for at in range(0, size, 4096)
    }


def with_offsets(entries, offset=0):
    for e in entries:
        e["offset"] = offset if e["flags"] & PE_PRESENT else -1
        offset += int(e["size"]) if e["flags"] & PE_PRESENT else 0
    return entries


@given(RUNS, RUNS)
def test_cut_to_agrees_with_the_reference_loop(runs, ranges):
    entries, cut = with_offsets(array(runs)), array(ranges)
    inside = {gva + at for gva, size, *_ in cut.tolist() for at in range(0, size, 4096)}
    expected = {page: where for page, where in pages_of(entries).items() if page in inside}
    assert pages_of(cut_to(entries, cut["gva"], ends_of(cut))) == expected


@given(RUNS, RUNS)
def test_covered_agrees_with_the_reference_loop(runs, ranges):
    entries, cut = array(runs), array(ranges)
    inside = {gva + at for gva, size, *_ in cut.tolist() for at in range(0, size, 4096)}
    expected = [
        all(gva + at in inside for at in range(0, size, 4096)) for gva, size, *_ in entries.tolist()
    ]
    assert covered(entries, cut["gva"], ends_of(cut)).tolist() == expected


@given(st.lists(RUNS, min_size=1, max_size=4))
def test_resolve_agrees_with_the_reference_loop(chain):
    levels = [with_offsets(array(runs)) for runs in chain]
    single = [pages_of(level) for level in levels]

    def find(page, level=0):
        while level < len(single) and page in single[level]:
            if single[level][page][1] is not None:
                return level, single[level][page][1]
            level += 1
        return None

    expected = {page: find(page) for page in single[0]}
    if None in expected.values():
        with pytest.raises(ImagesDamaged, match="should be in the parent images"):
            resolve(levels, NAME)
    else:
        whole = resolve(levels, NAME)
        assert pages_of(whole) == expected
        assert (whole["gva"][1:] >= ends_of(whole)[:-1]).all()
        assert total(whole) == total(levels[0])
