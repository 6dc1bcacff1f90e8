"""BPF Type Format: the guest kernel's own description of its types, read from its memory.

Types are parsed on demand, after a single pass that finds the beginning of each type. BTF comes
from the guest, so every count and offset is checked, and types that contain themselves are errors.

Source: include/uapi/linux/btf.h; Documentation/bpf/btf.rst.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ovr.errors import KernelNotFound
from ovr.kernel.cache import remembered
from ovr.kernel.symbols import matching

__all__ = [
    "Alias",
    "Array",
    "Btf",
    "Composite",
    "Enum",
    "Forward",
    "Int",
    "Kind",
    "Member",
    "Opaque",
    "Pointer",
    "Type",
    "Variable",
]

MAGIC: Final = 0xEB9F
VOID: Final = 0


class Kind(IntEnum):
    """Kinds of types: the BTF_KIND_* numbers."""

    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


# Words after the three of a type: once, and for each of its `vlen` elements. No words follow the
# kinds that are not listed.
FOLLOWS: Final = dict.fromkeys(map(int, Kind), (0, 0)) | {
    Kind.INT: (1, 0),
    Kind.ARRAY: (3, 0),
    Kind.STRUCT: (0, 3),
    Kind.UNION: (0, 3),
    Kind.ENUM: (0, 2),
    Kind.FUNC_PROTO: (0, 2),
    Kind.VAR: (1, 0),
    Kind.DATASEC: (0, 3),
    Kind.DECL_TAG: (1, 0),
    Kind.ENUM64: (0, 3),
}

KIND_MASK: Final = 0x7F
VLEN_MASK: Final = 0xFF_FFFF
INT_SIGNED: Final = 1
INT_BOOL: Final = 4
MAX_NESTING: Final = 64
MAX_OBJECT_SIZE: Final = 1 << 32


@dataclass(frozen=True, slots=True)
class Int:
    """An integer type; `size` in bytes."""

    name: str
    size: int
    signed: bool
    boolean: bool


@dataclass(frozen=True, slots=True)
class Pointer:
    """A pointer to the type with id `target` (0: void)."""

    target: int


@dataclass(frozen=True, slots=True)
class Array:
    """`count` elements of the type with id `element`; a flexible array has none."""

    element: int
    count: int


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a struct or union, at `bit_offset`; `bits` is the width of a bitfield, else 0."""

    name: str
    type: int
    bit_offset: int
    bits: int


@dataclass(frozen=True, slots=True)
class Composite:
    """A struct or union; `keyword` is the C keyword, `size` in bytes."""

    keyword: str
    name: str
    size: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Enum:
    """An enumeration, its `values` by name; `size` in bytes."""

    name: str
    size: int
    signed: bool
    values: dict[str, int]


@dataclass(frozen=True, slots=True)
class Forward:
    """A struct or union that is declared but not defined."""

    keyword: str
    name: str


@dataclass(frozen=True, slots=True)
class Alias:
    """A typedef, qualifier or type tag: another name for the type with id `target`."""

    name: str
    target: int


@dataclass(frozen=True, slots=True)
class Variable:
    """A global variable; the kernel's BTF has only the per-cpu ones."""

    name: str
    type: int


@dataclass(frozen=True, slots=True)
class Opaque:
    """Types without a readable value: void, functions, sections, floats."""

    name: str


Type = Int | Pointer | Array | Composite | Enum | Forward | Alias | Variable | Opaque


class Btf:
    """All types of one kernel, by id and by name.

    Args:
        data: the content of section .BTF.
        build_id: the key under which the result of the pass over the data is cached.

    Raises:
        KernelNotFound: the data is damaged or of an unknown kind.
    """

    def __init__(self, data: bytes, build_id: str = "") -> None:
        types, self._strings, layout = _sections(data)
        self._data = types
        (starts,) = remembered(
            build_id, "btf", (data,), lambda: (_starts(types, FOLLOWS | layout),)
        )
        self._starts = starts
        words = np.frombuffer(types, "<u4")
        self._names = words[starts]
        self._kinds = words[starts + 1] >> 24 & KIND_MASK
        self._of_kind: dict[tuple[int, ...], NDArray[np.intp]] = {}
        self._types: dict[int, Type] = {VOID: Opaque("void")}

    def __len__(self) -> int:
        """The number of types, `void` included."""
        return len(self._starts) + 1

    def find(self, name: str, *kinds: int) -> Iterator[int]:
        """Yield the ids of the types that have this name and one of these kinds, ascending."""
        if not name:
            return
        wanted = self._of_kind.get(kinds)
        if wanted is None:
            of_kind = np.isin(np.arange(KIND_MASK + 1), kinds)[self._kinds]
            wanted = self._of_kind[kinds] = np.flatnonzero(of_kind)
        text = np.frombuffer(self._strings, np.uint8)
        for index in matching(text, self._names[wanted], name.encode() + b"\0"):
            yield int(wanted[index]) + 1

    def type(self, type_id: int) -> Type:
        """Return the type with this id."""
        found = self._types.get(type_id)
        if found is None:
            found = self._types[type_id] = self._parse(type_id)
        return found

    def resolve(self, type_id: int) -> tuple[int, Type]:
        """Return the type, and its id, without typedefs, qualifiers and tags."""
        for _ in range(MAX_NESTING):
            found = self.type(type_id)
            if not isinstance(found, Alias):
                return type_id, found
            type_id = found.target
        raise _damaged(f"type {type_id} is an alias of itself")

    def sizeof(self, type_id: int) -> int:
        """Return the size of a type in bytes; 0 for void and functions."""
        count = 1
        for _ in range(MAX_NESTING):
            match self.resolve(type_id)[1]:
                case Array(element, length):
                    count *= length
                    type_id = element
                case Int(size=size) | Enum(size=size) | Composite(size=size):
                    return _plausible(count * size)
                case Pointer():
                    return _plausible(count * 8)
                case _:
                    return 0
        raise _damaged(f"array type {type_id} contains itself")

    def _parse(self, type_id: int) -> Type:  # noqa: PLR0911 - one for each kind
        if not 1 <= type_id < len(self):
            raise _damaged(f"there is no type {type_id}")
        at = 4 * int(self._starts[type_id - 1])
        name_offset, info, size_or_type = struct.unpack_from("<III", self._data, at)
        kind, vlen, flag = info >> 24 & KIND_MASK, info & VLEN_MASK, bool(info >> 31)
        name = self._string(name_offset)
        rest = at + 12
        match kind:
            case Kind.INT:
                (encoding,) = struct.unpack_from("<I", self._data, rest)
                return _integer(name, size_or_type, encoding)
            case Kind.PTR:
                return Pointer(size_or_type)
            case Kind.ARRAY:
                element, _, count = struct.unpack_from("<III", self._data, rest)
                return Array(element, count)
            case Kind.STRUCT | Kind.UNION:
                keyword = "struct" if kind == Kind.STRUCT else "union"
                return Composite(keyword, name, size_or_type, self._members(rest, vlen, flag))
            case Kind.ENUM | Kind.ENUM64:
                values = self._enumerators(rest, vlen, flag, wide=kind == Kind.ENUM64)
                return Enum(name, _scalar(size_or_type), flag, values)
            case Kind.FWD:
                return Forward("union" if flag else "struct", name)
            case Kind.TYPEDEF | Kind.VOLATILE | Kind.CONST | Kind.RESTRICT | Kind.TYPE_TAG:
                return Alias(name, size_or_type)
            case Kind.VAR:
                return Variable(name, size_or_type)
            case _:
                return Opaque(name)

    def _members(self, at: int, count: int, flag: bool) -> tuple[Member, ...]:
        members = []
        for name, type_id, where in struct.iter_unpack("<III", self._data[at : at + 12 * count]):
            # kind_flag: the upper byte of the offset is the width of a bitfield
            offset, bits = (where & 0xFF_FFFF, where >> 24) if flag else (where, 0)
            members.append(Member(self._string(name), type_id, offset, bits))
        return tuple(members)

    def _enumerators(self, at: int, count: int, signed: bool, *, wide: bool) -> dict[str, int]:
        form = ("<Iq" if signed else "<IQ") if wide else ("<Ii" if signed else "<II")
        data = self._data[at : at + struct.calcsize(form) * count]
        return {self._string(name): value for name, value in struct.iter_unpack(form, data)}

    def _string(self, offset: int) -> str:
        end = self._strings.find(b"\0", offset)
        if not 0 <= offset < len(self._strings) or end < 0:
            raise _damaged(f"there is no string at {offset:#x}")
        return self._strings[offset:end].decode(errors="backslashreplace")


def _damaged(what: str) -> KernelNotFound:
    return KernelNotFound(
        f"the guest kernel's BTF is damaged: {what}", "reboot the guest, or give its vmlinux file"
    )


def _sections(data: bytes) -> tuple[bytes, bytes, dict[int, tuple[int, int]]]:
    # The type and string sections, and the sizes of kinds in the layout section.
    try:
        magic, version, _, header = struct.unpack_from("<HBBI", data)
        type_offset, type_size, string_offset, string_size = struct.unpack_from("<IIII", data, 8)
    except struct.error:
        raise _damaged("it is too short") from None
    if magic != MAGIC or version != 1:
        raise _damaged(f"magic {magic:#x} and version {version} are not BTF version 1")
    if header < 24 or header > len(data) or (header + type_offset) % 4 or type_size % 4:
        raise _damaged("its header is invalid")
    types = _section(data, header + type_offset, type_size)
    strings = _section(data, header + string_offset, string_size)
    layout: dict[int, tuple[int, int]] = {}
    if header >= 32:
        layout_offset, layout_size = struct.unpack_from("<II", data, 24)
        layout = _layout(_section(data, header + layout_offset, layout_size))
    return types, strings, layout


def _section(data: bytes, start: int, size: int) -> bytes:
    if start + size > len(data):
        raise _damaged(f"a section of {size:#x} bytes at {start:#x} reaches past the end")
    return data[start : start + size]


def _layout(section: bytes) -> dict[int, tuple[int, int]]:
    # struct btf_layout { __u8 info_sz, elem_sz; __u16 flags; }[kind]: lets a reader skip
    # unknown kinds. Newer kernels have it.
    usable = section[: len(section) // 4 * 4]
    sizes = list(struct.iter_unpack("<BBH", usable))
    if any(once % 4 or each % 4 for once, each, _ in sizes):
        raise _damaged("its layout section is invalid")
    return {kind: (once // 4, each // 4) for kind, (once, each, _) in enumerate(sizes) if kind}


def _starts(types: bytes, follows: dict[int, tuple[int, int]]) -> NDArray[np.int32]:
    # The offset of each type, in words. The only loop over all types: keep it tight.
    words = memoryview(types).cast("I")
    once = [3 + follows[kind][0] if kind in follows else 0 for kind in range(KIND_MASK + 1)]
    each = [follows[kind][1] if kind in follows else 0 for kind in range(KIND_MASK + 1)]
    starts: list[int] = []
    append = starts.append
    at, end = 0, len(words)
    while at < end - 2:
        append(at)
        info = words[at + 1]
        kind = info >> 24 & KIND_MASK
        if not once[kind]:
            raise _damaged(f"type {len(starts)} is of unknown kind {kind}")
        at += once[kind] + each[kind] * (info & VLEN_MASK)
    if at != end or not starts:
        raise _damaged("its last type is cut off")
    return np.array(starts, np.int32)


def _integer(name: str, size: int, encoding: int) -> Int:
    flags, offset, bits = encoding >> 24 & 0xF, encoding >> 16 & 0xFF, encoding & 0xFF
    if offset or bits != 8 * _scalar(size):
        # pahole describes bitfields at the member (kind_flag), not at the type
        raise _damaged(f"integer type {name} is {bits} bits wide in {size} bytes")
    return Int(name, size, bool(flags & INT_SIGNED), bool(flags & INT_BOOL))


def _scalar(size: int) -> int:
    if size not in (1, 2, 4, 8, 16):
        raise _damaged(f"no integer has {size} bytes")
    return size


def _plausible(size: int) -> int:
    if size > MAX_OBJECT_SIZE:
        raise _damaged(f"a type of {size:#x} bytes")
    return size
