"""BTF, hand-made and damaged."""

import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr.errors import KernelNotFound, OvrError
from ovr.kernel.types import btf
from ovr.kernel.types.btf import Btf, Kind
from ovr.kernel.types.types import Types

from .writers import (
    CONST,
    DATASEC,
    DECL_TAG,
    FLOAT,
    FUNC,
    FUNC_PROTO,
    FWD,
    TYPE_TAG,
    TYPEDEF,
    VAR,
    BtfWriter,
)


def every_kind() -> tuple[bytes, dict[str, int]]:
    w = BtfWriter()
    ids = {"int": w.integer("int", 4, signed=True), "bool": w.integer("_Bool", 1, boolean=True)}
    ids["char"] = w.integer("char", 1, signed=True)
    ids["wide"] = w.integer("__int128", 16, signed=True)
    ids["pointer"] = w.pointer(ids["int"])
    ids["array"] = w.array(ids["int"], 3)
    ids["matrix"] = w.array(ids["array"], 5)
    ids["struct"] = w.struct("thing", 12, ("count", ids["int"], 0), ("name", ids["char"], 4))
    ids["bits"] = w.struct("flags", 4, ("low", ids["int"], 0, 3), ("high", ids["int"], 3, 29))
    ids["union"] = w.union("either", 4, ("a", ids["int"], 0), ("b", ids["char"], 0))
    ids["enum"] = w.enum("colour", RED=0, GREEN=1, BLUE=0xFFFF_FFFF)
    ids["signed"] = w.enum("signed_one", signed=True, MINUS=-1, PLUS=1)
    ids["enum64"] = w.enum("large", 8, wide=True, ALL=(1 << 64) - 1)
    ids["minus64"] = w.enum("large_signed", 8, wide=True, signed=True, LOW=-(1 << 63))
    ids["forward"] = w.add(FWD, "elsewhere", 0)
    ids["forward union"] = w.add(FWD, "elsewhere_too", 0, flag=True)
    ids["typedef"] = w.add(TYPEDEF, "thing_t", ids["struct"])
    ids["const"] = w.add(CONST, "", ids["typedef"])
    ids["tag"] = w.add(TYPE_TAG, "user", ids["const"])
    ids["proto"] = w.add(FUNC_PROTO, "", ids["int"], struct.pack("<II", 0, ids["int"]), vlen=1)
    ids["func"] = w.add(FUNC, "main", ids["proto"], vlen=1)
    ids["var"] = w.add(VAR, "runqueues", ids["struct"], struct.pack("<I", 1))
    secinfo = struct.pack("<III", ids["var"], 0x40, 12)
    ids["datasec"] = w.add(DATASEC, ".data..percpu", 12, secinfo, vlen=1)
    ids["float"] = w.add(FLOAT, "double", 8)
    ids["decl"] = w.add(DECL_TAG, "bpf_fastcall", ids["func"], struct.pack("<i", -1))
    ids["last"] = w.integer("short int", 2, signed=True)
    return w.build(), ids


BLOB, IDS = every_kind()


def test_every_kind_is_understood():
    types = Btf(BLOB)
    get = lambda name: types.type(IDS[name])  # noqa: E731
    assert get("int") == btf.Int("int", 4, signed=True, boolean=False)
    assert get("bool") == btf.Int("_Bool", 1, signed=False, boolean=True)
    assert get("pointer") == btf.Pointer(IDS["int"])
    assert get("array") == btf.Array(IDS["int"], 3)
    assert get("struct") == btf.Composite(
        "struct",
        "thing",
        12,
        (btf.Member("count", IDS["int"], 0, 0), btf.Member("name", IDS["char"], 32, 0)),
    )
    assert [(m.bit_offset, m.bits) for m in get("bits").members] == [(0, 3), (3, 29)]
    assert get("union").keyword == "union"
    assert get("enum").values == {"RED": 0, "GREEN": 1, "BLUE": 0xFFFF_FFFF}
    assert get("signed").values == {"MINUS": -1, "PLUS": 1}
    assert get("enum64").values == {"ALL": (1 << 64) - 1}
    assert get("minus64").values == {"LOW": -(1 << 63)}
    assert get("forward") == btf.Forward("struct", "elsewhere")
    assert get("forward union") == btf.Forward("union", "elsewhere_too")
    assert get("typedef") == btf.Alias("thing_t", IDS["struct"])
    assert get("var") == btf.Variable("runqueues", IDS["struct"])
    assert types.type(0) == btf.Opaque("void")
    # found only if every kind before it was stepped over right
    assert get("last") == btf.Int("short int", 2, signed=True, boolean=False)
    assert len(types) == len(IDS) + 1


def test_types_are_found_by_whole_name_and_kind():
    types = Btf(BLOB)
    assert list(types.find("thing", Kind.STRUCT)) == [IDS["struct"]]
    assert list(types.find("thing", Kind.UNION)) == []
    assert list(types.find("thing_t", Kind.TYPEDEF, Kind.STRUCT)) == [IDS["typedef"]]
    assert list(types.find("hing", Kind.STRUCT)) == []
    assert list(types.find("", Kind.PTR, Kind.CONST)) == []
    assert list(types.find("no such thing", *Kind)) == []


def test_aliases_and_sizes():
    types = Btf(BLOB)
    assert types.resolve(IDS["tag"])[0] == IDS["struct"]
    assert types.sizeof(IDS["tag"]) == 12
    assert types.sizeof(IDS["matrix"]) == 60
    assert types.sizeof(IDS["pointer"]) == 8
    assert types.sizeof(IDS["wide"]) == 16
    assert types.sizeof(IDS["func"]) == 0


def test_a_kind_of_the_future_is_stepped_over_if_the_layout_section_says_how():
    w = BtfWriter()
    w.add(25, "future", 0, struct.pack("<4I", 1, 2, 3, 4), vlen=1)
    last = w.integer("int", 4)
    layout = b"".join(
        struct.pack("<BBH", 8 if kind == 25 else 4 if kind == 1 else 0, 8 * (kind == 25), 0)
        for kind in range(26)
    )
    types = Btf(w.build(layout=layout))
    assert types.type(last) == btf.Int("int", 4, signed=False, boolean=False)
    assert types.type(1) == btf.Opaque("future")
    with pytest.raises(KernelNotFound, match="unknown kind 25"):
        Btf(w.build())


def test_more_elements_than_16_bits_can_count():
    # The vlen of newer kernels has 24 bits.
    w = BtfWriter()
    many = w.enum("many", **{f"E{n}": n for n in range(70_000)})
    last = w.integer("int", 4)
    types = Btf(w.build())
    assert types.type(many).values["E69999"] == 69_999
    assert types.type(last).name == "int"


def test_types_that_contain_themselves():
    w = BtfWriter()
    w.add(TYPEDEF, "loop", 1)
    w.add(CONST, "", 3)
    w.add(CONST, "", 2)
    w.array(4, 1)
    types = Btf(w.build())
    for type_id in (1, 2, 3):
        with pytest.raises(KernelNotFound, match="alias of itself"):
            types.resolve(type_id)
    with pytest.raises(KernelNotFound, match="contains itself"):
        types.sizeof(4)


def test_a_type_larger_than_any_object():
    w = BtfWriter()
    element = w.integer("int", 4)
    for _ in range(8):
        element = w.array(element, 0xFFFF_FFFF)
    with pytest.raises(KernelNotFound, match="bytes"):
        Btf(w.build()).sizeof(element)


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x9f\xeb\x01",
        b"\x9e" + BLOB[1:],
        BLOB[:2] + b"\x02" + BLOB[3:],
        BLOB[:4] + struct.pack("<I", 8) + BLOB[8:],
        BLOB[:12] + struct.pack("<I", 1 << 31) + BLOB[16:],
        BLOB[:20] + struct.pack("<I", 1 << 31) + BLOB[24:],
        BLOB[:-1],
        BLOB[:24],
    ],
)
def test_bad_headers(blob):
    with pytest.raises(KernelNotFound, match="BTF is damaged"):
        Btf(blob)


def test_names_that_are_no_text():
    w = BtfWriter()
    integer = w.integer("int", 4)
    odd = w.struct("odd", 4, ("name", integer, 0))
    blob = w.build().replace(b"odd\0", b"\xff\xfe\x01\0").replace(b"name\0", b"\x80\x81e \0")
    types = Types(Btf(blob))
    assert types.make_class(odd).type_ == "struct \\xff\\xfe\x01"


def test_unknown_ids_and_integers_that_are_bitfields():
    w = BtfWriter()
    w.integer("int", 4, bits=3)
    w.integer("int", 3)
    types = Btf(w.build())
    for type_id in (1, 2, 3, -1, 1 << 32):
        with pytest.raises(KernelNotFound):
            types.type(type_id)


@settings(max_examples=300)
@given(st.data())
def test_damage_is_noticed_or_harmless(data):
    # Whatever the bytes: every type can be asked for, and what comes is a type or our error.
    blob = bytearray(BLOB)
    for _ in range(data.draw(st.integers(1, 6))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    blob = blob[: data.draw(st.sampled_from([len(blob), len(blob) - 4, len(blob) // 2]))]
    try:
        parsed = Btf(bytes(blob))
    except KernelNotFound:
        return
    types = Types(parsed)
    for type_id in range(len(parsed)):
        for ask in (parsed.type, parsed.resolve, parsed.sizeof, types.make_class, types._codec):
            with suppress(OvrError):
                ask(type_id)
