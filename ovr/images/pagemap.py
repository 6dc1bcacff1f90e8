"""Decode and encode pagemap images: the offset of each page of a task in its pages image.

A fragmented process has more than a million entries, so they are decoded in blocks into one numpy
array instead of one protobuf object each. The rules are those of ``criu/pagemap.c``
(``init_compat_pagemap_entry``, ``advance``): an entry has data in the pages image, behind the data
of the entries before it, exactly if it has PE_PRESENT.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ovr.errors import ImagesDamaged, ImagesUnsupported
from ovr.images.framing import DUMP_AGAIN, check_header, decode, encode, image_bytes
from ovr.images.messages import PagemapEntry, PagemapHead
from ovr.images.varint import BadVarint, read_varints
from ovr.memory.addresses import PAGE_SHIFT, PAGE_SIZE
from ovr.memory.extents import Extents, ends_of, total

__all__ = [
    "MAX_PAGEMAP",
    "PAGEMAP_DTYPE",
    "PE_LAZY",
    "PE_PARENT",
    "PE_PRESENT",
    "USER_END",
    "Pagemap",
    "check_pages_size",
    "decode_pagemap",
    "encode_pagemap",
    "offsets_of",
]

PE_PARENT: Final = 1
PE_LAZY: Final = 2
PE_PRESENT: Final = 4

PAGEMAP_DTYPE: Final = np.dtype(
    [("gva", "<u8"), ("size", "<u8"), ("flags", "<u4"), ("level", "<u4"), ("offset", "<i8")]
)
"""An extent, in bytes; `offset` is a position in the pages image of level `level`; level 0 is the
image set itself, 1 its parent, and so on. Without PE_PRESENT there is no data there: the offset is
-1, or anything once the extent was cut."""

MAX_PAGEMAP: Final = 256 << 20
"""Most bytes of a pagemap image that are read: about 16 million runs."""
USER_END: Final = 1 << 56
"""End of user addresses with 5-level paging, the most that x86-64 has."""

_BLOCK: Final = 1 << 16  # entries decoded at a time: small enough for the processor's cache
_FIELDS: Final = {0x08: "vaddr", 0x10: "compat", 0x18: "in_parent", 0x20: "flags", 0x28: "nr_pages"}
_UINT32: Final = 0xFFFFFFFF


@dataclass(frozen=True)
class Pagemap:
    """A decoded pagemap image.

    Attributes:
        pages_id: N of the ``pages-N.img`` that holds the data.
        entries: the runs, in ascending order; read-only.
        compat: written by CRIU before 4.2, which counts pages in field 2 and does not know field 5.
    """

    pages_id: int
    entries: Extents
    compat: bool


def decode_pagemap(data: bytes, name: str) -> Pagemap:
    """Decode a whole pagemap image.

    Args:
        data: the file.
        name: its name in messages; the base name determines the expected magic.

    Raises:
        ImagesDamaged: truncated, out of order, overlapping, unaligned, or outside user addresses.
        ImagesUnsupported: an unknown field or flag (compressed pages), or pages that no image
            contains (a lazy dump).
    """
    begin = check_header(data, name.rpartition("/")[2])
    size = _entry_size(data, begin, name)
    head = decode(PagemapHead, data[begin + 4 : begin + 4 + size], name)
    blocks = [_decode_block(data, at, name) for at in _entry_starts(data, begin + 4 + size, name)]
    entries = np.concatenate([block for block, _ in blocks] or [np.empty(0, PAGEMAP_DTYPE)])
    entries = entries[entries["size"] != 0]  # CRIU skips them as well
    _check(entries, name)
    entries["offset"] = offsets_of(entries)
    entries.flags.writeable = False
    return Pagemap(head.pages_id, entries, not any(modern for _, modern in blocks))


def _entry_size(data: bytes, position: int, name: str) -> int:
    size = int.from_bytes(data[position : position + 4], "little")
    if position + 4 + size > len(data):
        raise ImagesDamaged(f"{name}: cut off at byte {len(data)}", DUMP_AGAIN)
    return size


def _entry_starts(data: bytes, position: int, name: str) -> Iterator[NDArray[np.int64]]:
    """Yield the positions of the entries' size fields, in blocks.

    Only the lowest byte of each size is used: no entry is as long as 256 bytes. `_decode_block`
    checks in bulk that the other three are zero.
    """
    last = len(data) - 4
    while position <= last:
        starts: list[int] = []
        while position <= last and len(starts) < _BLOCK:
            starts.append(position)
            position += 4 + data[position]
        yield np.array(starts, np.int64)
    if position != len(data):
        raise ImagesDamaged(f"{name}: cut off at byte {len(data)}", DUMP_AGAIN)


def _decode_block(data: bytes, starts: NDArray[np.int64], name: str) -> tuple[Extents, bool]:
    """Return the entries at `starts`, and whether any of them counts pages in field 5."""
    raw = np.frombuffer(data, np.uint8)
    high = raw[starts + 1] | raw[starts + 2] | raw[starts + 3]
    if high.any():
        raise ImagesUnsupported(
            f"{name}: an entry too long for a pagemap at byte {starts[high.argmax()]}",
            "compressed pages? Dump without --compress; if the file is damaged, dump again",
        )
    at, stop = starts + 4, starts + 4 + raw[starts]
    if stop[-1] > len(data):
        raise ImagesDamaged(f"{name}: cut off at byte {len(data)}", DUMP_AGAIN)
    try:
        return _columns(raw, at, stop, name)
    except BadVarint as error:
        raise ImagesDamaged(f"{name}: an entry that is not protobuf", DUMP_AGAIN) from error


def _columns(
    raw: NDArray[np.uint8], at: NDArray[np.int64], stop: NDArray[np.int64], name: str
) -> tuple[Extents, bool]:
    value = {field: np.zeros(len(at), np.uint64) for field in _FIELDS.values()}
    seen = {field: np.zeros(len(at), bool) for field in _FIELDS.values()}
    live = np.arange(len(at))
    while live.size:
        tags, at[live] = read_varints(raw, at[live], stop[live])
        values, at[live] = read_varints(raw, at[live], stop[live])
        known = 0
        for tag, field in _FIELDS.items():
            here = tags == tag
            known += int(np.count_nonzero(here))
            value[field][live[here]] = values[here]
            seen[field][live[here]] = True
        if known != live.size:
            raise ImagesUnsupported(
                f"{name}: an entry with a field that CRIU 4.2 does not have",
                "compressed pages? Dump without --compress; if the file is damaged, dump again",
            )
        live = live[at[live] < stop[live]]
    _check_required(seen, name)
    return _entries(value, seen, name), bool(seen["nr_pages"].any())


def _check_required(seen: dict[str, NDArray[np.bool_]], name: str) -> None:
    if not seen["vaddr"].all() or not (seen["compat"] | seen["nr_pages"]).all():
        raise ImagesDamaged(f"{name}: an entry without address or number of pages", DUMP_AGAIN)


def _entries(
    value: dict[str, NDArray[np.uint64]], seen: dict[str, NDArray[np.bool_]], name: str
) -> Extents:
    """Apply init_compat_pagemap_entry of criu/pagemap.c."""
    pages = np.where(seen["nr_pages"], value["nr_pages"], value["compat"] & _UINT32)
    _check_bounds(value["vaddr"], pages, name)
    entries = np.zeros(len(pages), PAGEMAP_DTYPE)
    entries["gva"], entries["size"] = value["vaddr"], pages << PAGE_SHIFT
    in_parent = value["in_parent"] != 0
    entries["flags"] = value["flags"] & _UINT32
    entries["flags"][~in_parent & ~seen["flags"]] = PE_PRESENT
    entries["flags"][in_parent] |= PE_PARENT
    return entries


def _check_bounds(start: NDArray[np.uint64], pages: NDArray[np.uint64], name: str) -> None:
    """Raise unless all arithmetic on addresses and sizes is safe."""
    wrong = (start % PAGE_SIZE != 0) | (start >= USER_END)
    wrong |= pages > (USER_END - np.minimum(start, USER_END)) >> PAGE_SHIFT
    wrong &= pages != 0  # CRIU passes over them
    if wrong.any():
        first = int(wrong.argmax())
        raise ImagesDamaged(
            f"{name}: impossible run of pages at {start[first]:#x} ({pages[first]} pages)",
            DUMP_AGAIN,
        )


def _check(entries: Extents, name: str) -> None:
    """Raise unless entries are in order, and their flags are known."""
    start, flags = entries["gva"], entries["flags"]
    wrong = np.append(False, start[1:] < ends_of(entries)[:-1])
    if wrong.any():
        raise ImagesDamaged(
            f"{name}: entry not above the one before at {start[wrong.argmax()]:#x}", DUMP_AGAIN
        )
    where = flags & (PE_PARENT | PE_PRESENT)
    unknown = (flags > (PE_PARENT | PE_LAZY | PE_PRESENT)) | (where == PE_PARENT | PE_PRESENT)
    for bad, what, cure in (
        (unknown, "have unknown flags", "dump with CRIU 3.17 to 4.2, without --compress"),
        (where == 0, "are in no image", "dump without --lazy-pages"),
    ):
        if bad.any():
            raise ImagesUnsupported(f"{name}: the pages at {start[bad.argmax()]:#x} {what}", cure)


def offsets_of(entries: Extents) -> NDArray[np.int64]:
    """Return the offset of each entry's data in the pages image; -1 without PE_PRESENT."""
    present = entries["flags"] & PE_PRESENT != 0
    sizes = np.where(present, entries["size"], 0).astype(np.int64)
    return np.where(present, np.cumsum(sizes) - sizes, -1)


def check_pages_size(pagemap: Pagemap, size: int, name: str) -> None:
    """Check that a pages image of `size` bytes holds all present pages of `pagemap`.

    Raises:
        ImagesDamaged: it is shorter.
    """
    present = pagemap.entries["flags"] & PE_PRESENT != 0
    needed = total(pagemap.entries[present])
    if size < needed:
        raise ImagesDamaged(f"{name}: {needed} bytes needed, {size} present", DUMP_AGAIN)


def encode_pagemap(pagemap: Pagemap, name: str) -> bytes:
    """Encode a pagemap image in the format of the CRIU version that wrote the original.

    The data follow in the order of the entries; `offset` and `level` are ignored.
    """
    made = [encode(PagemapHead(pages_id=pagemap.pages_id))]
    for gva, size, flags in pagemap.entries[["gva", "size", "flags"]].tolist():
        entry = PagemapEntry(vaddr=gva, compat_nr_pages=0, flags=flags)
        setattr(entry, "compat_nr_pages" if pagemap.compat else "nr_pages", size >> PAGE_SHIFT)
        made.append(encode(entry))
    return image_bytes(name, made)
