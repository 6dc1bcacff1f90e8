"""The kernel's own symbol table, read from its memory.

Names are stored compressed, one after the other, each with its length in front; a byte of a name
stands for a token of one or more characters. Addresses are stored in one of four ways, which
depend on the kernel's configuration and age; the address of `_stext`, known from VMCOREINFO, shows
which of them is used.

A restore needs a handful of the 150 000 symbols. All names are expanded at once into one text
(`remembered` for each kernel build), in which a name is then searched.

Source: scripts/kallsyms.c, kernel/kallsyms.c.
"""

from collections.abc import Iterator
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ovr.errors import KernelNotFound
from ovr.kernel.cache import remembered
from ovr.kernel.find.vmcoreinfo import VmcoreInfo
from ovr.kernel.symbols import Addresses, SymbolTable, matching
from ovr.memory.addresses import Gva

__all__ = ["read_kallsyms"]

MAX_SYMBOLS: Final = 1 << 22
MAX_COMPRESSED: Final = 1 << 26
MAX_EXPANDED: Final = 1 << 28
MAX_TOKEN: Final = 512
TOKENS: Final = 256
NAME_BEGINS, NOTHING = TOKENS, TOKENS + 1  # codes of our own, for the bytes of a length
CHUNK: Final = 1 << 15  # codes expanded at once: few enough to stay in the CPU's cache

Places = NDArray[np.intp]


class Readable(Protocol):
    """The part of an address space that this module uses."""

    def read(self, gva: Gva, size: int) -> bytes:
        """Read guest virtual memory."""


def read_kallsyms(space: Readable, info: VmcoreInfo) -> SymbolTable:
    """Read the symbol table of a kernel.

    Raises:
        KernelNotFound: VMCOREINFO has no address of it, or its content is invalid.
        GuestFault: it is not mapped.
    """
    where = {
        name.removeprefix("kallsyms_"): address
        for name, address in info.symbols.items()
        if name.startswith("kallsyms_")
    }
    missing = {"names", "num_syms", "token_table", "token_index"} - where.keys()
    if missing or not where.keys() & {"offsets", "addresses"}:
        # Linux kernel commit f09bddbd8661 ("vmcoreinfo: add kallsyms_num_syms symbol") (in v6.0)
        # and its neighbours put these into VMCOREINFO.
        raise KernelNotFound(
            "the guest kernel's symbol table cannot be found",
            "it must have CONFIG_KALLSYMS and be Linux 6.0 or newer; or give its --vmlinux",
        )
    count = int.from_bytes(space.read(where["num_syms"], 4), "little")
    # The tokens come after the names in every layout so far (with the markers in between).
    size = where["token_table"] - where["names"]
    if not 0 < count <= MAX_SYMBOLS or not 0 < size <= MAX_COMPRESSED:
        raise _damaged(f"{count} symbols in {size:#x} bytes")
    tokens = _tokens(space, where["token_table"], where["token_index"])
    data = space.read(where["names"], size)
    names, starts = remembered(
        info.build_id,
        "kallsyms",
        (count.to_bytes(4, "little"), data, *tokens),
        lambda: _expand(data, count, tokens),
    )
    sizes = np.diff(starts, append=len(names) + 1) - 1  # without the type letter
    stext = matching(names, starts, b"_stext\n", sizes)
    if not stext:
        raise _damaged("it does not list _stext")
    addresses = _addresses(space, where, count, stext[0], info.symbols["_stext"])
    return SymbolTable(names, starts, addresses, b"\n", sizes)


def _damaged(what: str) -> KernelNotFound:
    return KernelNotFound(
        f"the guest kernel's symbol table is damaged: {what}",
        "reboot the guest, or give its vmlinux file",
    )


def _tokens(space: Readable, table: Gva, index: Gva) -> list[bytes]:
    offsets = np.frombuffer(space.read(index, 2 * TOKENS), "<u2").tolist()
    # token_index follows the table, so that reading a little too far is no fault
    text = space.read(table, max(offsets) + MAX_TOKEN)
    return [text[start : start + MAX_TOKEN].partition(b"\0")[0] for start in offsets]


def _expand(
    data: bytes, count: int, tokens: list[bytes]
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    # All names, each followed by a newline, and the start of each (after its type letter).
    heads, seconds, end = _lengths(data, count)
    codes = np.frombuffer(data, np.uint8, end).astype(np.uint16)
    codes[heads], codes[seconds] = NAME_BEGINS, NOTHING
    texts = [*tokens, b"\n", b""]
    characters = np.frombuffer(b"".join(texts), np.uint8)
    sizes = np.array([*map(len, texts)], np.int32)
    begins = np.cumsum(sizes, dtype=np.int32) - sizes
    ends = np.cumsum(sizes[codes], dtype=np.int64)
    if ends[-1] > MAX_EXPANDED:
        raise _damaged(f"its names expand to {ends[-1]} bytes")
    parts = [_written_out(codes[at : at + CHUNK], characters, sizes, begins)
             for at in range(0, end, CHUNK)]  # fmt: skip
    names = np.concatenate([*parts, np.frombuffer(b"\n", np.uint8)])
    return names, (ends[heads] + 1).astype(np.int32)


def _written_out(
    codes: NDArray[np.uint16],
    characters: NDArray[np.uint8],
    sizes: NDArray[np.int32],
    begins: NDArray[np.int32],
) -> NDArray[np.uint8]:
    # Character n of the result is `begins` of its token, plus how far into the token it is.
    size = sizes[codes]
    ends = np.cumsum(size, dtype=np.int32)
    pick = np.arange(ends[-1], dtype=np.int32) + np.repeat(begins[codes] - ends + size, size)
    written: NDArray[np.uint8] = characters[pick]
    return written


def _lengths(data: bytes, count: int) -> tuple[Places, Places, int]:
    # Offsets of each name's length, whether it has a second byte, and the end of the last name.
    heads: list[int] = []
    seconds: list[int] = []
    append = heads.append
    at = 0
    try:
        for _ in range(count):
            append(at)
            length = data[at]
            at += 1 + length
            if length & 0x80:
                # Linux kernel commit 73bbb94466fd ("kallsyms: support "big" kernel symbols")
                # (in v6.1): long names have a length in ULEB128
                at += -length + (length & 0x7F | data[at - length] << 7) + 1
                seconds.append(heads[-1] + 1)
    except IndexError:
        at = len(data) + 1
    if at > len(data):
        raise _damaged("its names reach past their end")
    return np.array(heads, np.intp), np.array(seconds, np.intp), at


def _addresses(
    space: Readable, where: dict[str, Gva], count: int, stext: int, expected: Gva
) -> Addresses:
    if "addresses" in where:
        absolute = np.frombuffer(space.read(where["addresses"], 8 * count), "<u8")
        if int(absolute[stext]) == expected:
            return absolute
        raise _damaged("its addresses do not fit _stext")
    offsets = np.frombuffer(space.read(where["offsets"], 4 * count), "<i4").astype(np.int64)
    base = 0
    if "relative_base" in where:
        base = int.from_bytes(space.read(where["relative_base"], 8), "little")
    for addresses in _decodings(offsets, where["offsets"], base):
        if int(addresses[stext]) == expected:
            return addresses
    raise _damaged("no known encoding of its addresses fits _stext")


def _decodings(offsets: NDArray[np.int64], table: Gva, base: int) -> Iterator[Addresses]:
    # Sums wrap at 64 bits, as the kernel's do.
    unsigned = offsets.view(np.uint64)
    before_base = np.uint64((base - 1) % (1 << 64))
    # CONFIG_KALLSYMS_ABSOLUTE_PERCPU: per-cpu symbols are literal, the others count down.
    # Linux kernel commit 01157ddc58dc ("kallsyms: Remove KALLSYMS_ABSOLUTE_PERCPU") (in v6.15)
    yield np.where(offsets < 0, before_base - unsigned, unsigned)
    # CONFIG_KALLSYMS_BASE_RELATIVE without it
    yield np.uint64(base) + (unsigned & np.uint64(0xFFFF_FFFF))
    # since Linux 7.0 there is no base: each offset is relative to its own address
    places = np.arange(len(offsets), dtype=np.uint64) * np.uint64(4)
    yield np.uint64(table) + places + unsigned
