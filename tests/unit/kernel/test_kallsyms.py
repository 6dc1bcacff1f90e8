"""kallsyms in all encodings, and damaged."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr.errors import GuestFault, KernelNotFound
from ovr.kernel.find import kallsyms
from ovr.kernel.find.kallsyms import read_kallsyms
from ovr.kernel.find.vmcoreinfo import VmcoreInfo, parse
from ovr.kernel.symbols import SymbolTable
from ovr.memory.addresses import Gpa

from .writers import ENCODINGS, KallsymsWriter, Memory, vmcoreinfo_text

BASE = 0xFFFF_FFFF_8220_0000
TEXT = 0xFFFF_FFFF_8100_0000
LONG = "long_name" * 300  # 300 codes: a two-byte length
SYMBOLS = [
    ("_text", TEXT),
    ("_stext", TEXT),
    ("start_kernel", TEXT + 0x123),
    ("__start_kernel", TEXT + 0x456),
    ("init_task", TEXT + 0x1A0_0940),
    (LONG, TEXT + 0x7777),
    ("twin", TEXT + 0x8000),
    ("twin", TEXT + 0x9000),
    ("_end", TEXT + 0x3F0_0000),
]
PERCPU = [("fixed_percpu_data", 0), ("cpu_number", 0x1F000)]


def build(encoding: str, symbols: list[tuple[str, int]]) -> tuple[Memory, VmcoreInfo]:
    data, where = KallsymsWriter(symbols, encoding).build(BASE)
    memory = Memory(BASE, len(data) + 4096)
    memory.data[: len(data)] = data
    required = {"_stext": TEXT, "init_uts_ns": TEXT, "swapper_pg_dir": TEXT}
    info = parse(Gpa(0), vmcoreinfo_text(where | required))
    assert info is not None
    return memory, info


def read(encoding: str, symbols: list[tuple[str, int]] = SYMBOLS) -> SymbolTable:
    return read_kallsyms(*build(encoding, symbols))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_symbol_in_every_encoding(encoding):
    # only two of the encodings can hold addresses far below the kernel
    symbols = (PERCPU if encoding in ("absolute", "absolute percpu") else []) + SYMBOLS
    found = read(encoding, symbols)
    assert list(found) == symbols
    assert len(found) == len(symbols)
    for name, address in symbols:
        assert address in found.all(name)


def test_lookup_takes_whole_names_only():
    found = read("base relative")
    assert found.get("start_kernel") == TEXT + 0x123
    assert found.get("tart_kernel") is None
    assert found.get("") is None
    assert found.get("Tinit_task") is None
    assert found.get(LONG) == TEXT + 0x7777
    assert found.all("twin") == [TEXT + 0x8000, TEXT + 0x9000]


def test_stext_must_fit():
    memory, info = build("base relative", SYMBOLS)
    memory.poke(info.symbols["kallsyms_relative_base"], "Q", TEXT + 0x1000)
    with pytest.raises(KernelNotFound, match="no known encoding"):
        read_kallsyms(memory, info)
    memory, info = build("absolute", SYMBOLS)
    memory.poke(info.symbols["kallsyms_addresses"] + 8, "Q", TEXT + 0x1000)
    with pytest.raises(KernelNotFound, match="do not fit _stext"):
        read_kallsyms(memory, info)


def test_a_table_without_stext():
    with pytest.raises(KernelNotFound, match="does not list _stext"):
        read("absolute", [("_text", TEXT), ("x_stext", TEXT), ("_stextx", TEXT)])


@pytest.mark.parametrize("count", [0, 1 << 23, 0xFFFF_FFFF, len(SYMBOLS) + 500])
def test_impossible_counts(count):
    memory, info = build("absolute", SYMBOLS)
    memory.poke(info.symbols["kallsyms_num_syms"], "I", count)
    with pytest.raises(KernelNotFound, match="damaged"):
        read_kallsyms(memory, info)


def test_names_that_expand_without_end(monkeypatch):
    monkeypatch.setattr(kallsyms, "MAX_EXPANDED", 100_000)
    memory, info = build("absolute", SYMBOLS)
    # every token becomes the longest there is
    table = info.symbols["kallsyms_token_table"] - BASE
    memory.data[table : table + 511] = b"a" * 511
    memory.data[table + 511] = 0
    memory.poke(info.symbols["kallsyms_token_index"], "256H", *[0] * 256)
    with pytest.raises(KernelNotFound, match="expand to"):
        read_kallsyms(memory, info)


def test_vmcoreinfo_without_kallsyms():
    required = {"_stext": TEXT, "init_uts_ns": TEXT, "swapper_pg_dir": TEXT}
    info = parse(Gpa(0), vmcoreinfo_text(required))
    assert info is not None
    with pytest.raises(KernelNotFound) as caught:
        read_kallsyms(Memory(), info)
    assert "CONFIG_KALLSYMS" in caught.value.hint


@settings(max_examples=200)
@given(st.data())
def test_damage_is_noticed_or_harmless(data):
    memory, info = build(data.draw(st.sampled_from(ENCODINGS)), SYMBOLS)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(memory.data) - 4))
        memory.data[at : at + 4] = struct.pack("<I", data.draw(st.integers(0, (1 << 32) - 1)))
    try:
        found = read_kallsyms(memory, info)
    except (KernelNotFound, GuestFault):
        return
    assert found.get("_stext") == TEXT
