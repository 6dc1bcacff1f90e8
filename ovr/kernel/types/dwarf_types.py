"""Types as DWARF has them, converted to BTF: what pahole does.

Source: DWARF 5, chapter 5; include/uapi/linux/btf.h.
"""

import struct
from collections.abc import Iterator
from typing import Any, Final

from ovr.kernel.types.btf import INT_BOOL, INT_SIGNED, MAGIC, Kind

__all__ = ["Converter", "Name", "name_of"]

MAX_ENTRIES: Final = 1 << 20
TAGS: Final = {
    "DW_TAG_base_type": Kind.INT,
    "DW_TAG_pointer_type": Kind.PTR,
    "DW_TAG_array_type": Kind.ARRAY,
    "DW_TAG_structure_type": Kind.STRUCT,
    "DW_TAG_union_type": Kind.UNION,
    "DW_TAG_enumeration_type": Kind.ENUM,
    "DW_TAG_typedef": Kind.TYPEDEF,
    "DW_TAG_volatile_type": Kind.VOLATILE,
    "DW_TAG_const_type": Kind.CONST,
    "DW_TAG_atomic_type": Kind.CONST,
    "DW_TAG_restrict_type": Kind.RESTRICT,
    "DW_TAG_subroutine_type": Kind.FUNC_PROTO,
}
ENCODINGS: Final = {2: INT_BOOL, 5: INT_SIGNED, 6: INT_SIGNED, 7: 0, 8: 0, 16: 0}  # DW_ATE_*
DW_OP_PLUS_UCONST: Final = 0x23

Name = tuple[str, str]
"""The tag and the name of a type."""


class Converter:
    """Types in, section .BTF out.

    Attributes:
        defined: the named types that are in it with their definition.
    """

    # A type has its id before it is written: types refer to each other in circles.

    def __init__(self) -> None:
        self.defined: set[Name] = set()
        self._records: list[bytes] = []
        self._strings = bytearray(1)
        self._offsets = {"": 0}
        self._ids: dict[object, int] = {}
        self._todo: list[tuple[int, Any]] = []
        self._entries = 0

    def add(self, die: Any) -> None:
        """Write a type and all that it leads to."""
        self._id(die)
        while self._todo:
            type_id, found = self._todo.pop()
            self._records[type_id - 1] = self._record(found)

    def section(self) -> bytes:
        """Return the content of section .BTF."""
        types = b"".join(self._records)
        sizes = (0, len(types), len(types), len(self._strings))
        return struct.pack("<HBBIIIII", MAGIC, 1, 0, 24, *sizes) + types + self._strings

    def children(self, die: Any) -> Iterator[Any]:
        """Yield a DIE's children.

        Unlike pyelftools it only goes onward, even where DW_AT_sibling does not.

        Raises:
            ValueError: there are more than can be.
        """
        at, depth = die.offset + die.size, int(die.has_children)
        while depth:
            self._entries += 1
            if self._entries > MAX_ENTRIES:
                raise ValueError(f"it is too large: more than {MAX_ENTRIES} entries")
            child = die.cu.get_DIE_from_refaddr(at)
            at += child.size
            if child.is_null():
                depth -= 1
                continue
            if depth == 1:
                yield child
            sibling = child.attributes.get("DW_AT_sibling")
            if sibling and sibling.form == "DW_FORM_ref4" and die.cu.cu_offset + sibling.value > at:
                at = die.cu.cu_offset + sibling.value
            else:
                depth += child.has_children

    def _id(self, die: Any) -> int:
        kind = TAGS.get(die.tag)
        if kind is None:
            return 0
        name, size = name_of(die), _number(die, "DW_AT_byte_size")
        # Structs of one name may differ between compile units, but then hardly by their size only.
        declared = "DW_AT_declaration" in die.attributes
        known = name and kind != Kind.TYPEDEF
        key = (die.tag, name, size, declared) if known else die.offset
        if key not in self._ids:
            self._ids[key] = self._reserve()
            self._todo.append((self._ids[key], die))
            if not declared:
                self.defined.add((die.tag, name))
        return self._ids[key]

    def _reserve(self, record: bytes = b"") -> int:
        self._records.append(record)
        return len(self._records)

    def _target(self, die: Any) -> int:
        has = "DW_AT_type" in die.attributes
        return self._id(die.get_DIE_from_attribute("DW_AT_type")) if has else 0

    def _string(self, text: str) -> int:
        if text not in self._offsets:
            self._offsets[text] = len(self._strings)
            self._strings += text.encode() + b"\0"
        return self._offsets[text]

    def _head(self, kind: int, name: str, size: int, vlen: int = 0, *, flag: bool = False) -> bytes:
        return struct.pack("<III", self._string(name), flag << 31 | kind << 24 | vlen, size)

    def _record(self, die: Any) -> bytes:  # noqa: PLR0911 - one for each kind
        kind, name, size = TAGS[die.tag], name_of(die), _number(die, "DW_AT_byte_size")
        match kind:
            case Kind.STRUCT | Kind.UNION if "DW_AT_declaration" in die.attributes:
                return self._head(Kind.FWD, name, 0, flag=kind == Kind.UNION)
            case Kind.STRUCT | Kind.UNION:
                return self._composite(die, kind, name, size)
            case Kind.INT:
                encoding = ENCODINGS.get(_number(die, "DW_AT_encoding"))
                if encoding is None:
                    return self._head(Kind.FLOAT, name, size)
                return self._head(kind, name, size) + struct.pack("<I", encoding << 24 | 8 * size)
            case Kind.ENUM:
                return self._enum(die, name, size)
            case Kind.ARRAY:
                return self._array(die)
            case Kind.FUNC_PROTO:
                return self._head(kind, "", 0)
            case _:
                return self._head(kind, name if kind == Kind.TYPEDEF else "", self._target(die))

    def _composite(self, die: Any, kind: int, name: str, size: int) -> bytes:
        members = [
            (self._string(name_of(member)), self._target(member), *_place(member))
            for member in self.children(die)
            if member.tag == "DW_TAG_member"
        ]
        flag = any(bits for *_, bits in members)
        if flag:  # then BTF cannot tell of what lies beyond 2 MiB
            members = [member for member in members if member[2] < 1 << 24]
        rest = b"".join(struct.pack("<III", *at, bit | bits << 24) for *at, bit, bits in members)
        return self._head(kind, name, size, len(members), flag=flag) + rest

    def _array(self, die: Any) -> bytes:
        element = self._target(die)
        ranges = [child for child in self.children(die) if child.tag == "DW_TAG_subrange_type"]
        outermost, *inner = map(_count, ranges or [die])
        head = self._head(Kind.ARRAY, "", 0)
        for count in inner[::-1]:
            element = self._reserve(head + struct.pack("<III", element, 0, count))
        return head + struct.pack("<III", element, 0, outermost)

    def _enum(self, die: Any, name: str, size: int) -> bytes:
        values = [
            (self._string(name_of(child)), _number(child, "DW_AT_const_value"))
            for child in self.children(die)
            if child.tag == "DW_TAG_enumerator"
        ]
        signed = any(value < 0 for _, value in values)
        wide = size > 4
        form = ("<Iq" if signed else "<IQ") if wide else ("<Ii" if signed else "<II")
        kind = Kind.ENUM64 if wide else Kind.ENUM
        rest = b"".join(struct.pack(form, *value) for value in values)
        return self._head(kind, name, size, len(values), flag=signed) + rest


def name_of(die: Any) -> str:
    """Return a DIE's name; empty if it has none."""
    name = die.attributes.get("DW_AT_name")
    return str(name.value, "utf-8", "backslashreplace") if name else ""


def _number(die: Any, attribute: str) -> int:
    found = die.attributes.get(attribute)
    return int(found.value) if found and isinstance(found.value, int) else 0


def _count(subrange: Any) -> int:
    # A flexible array has no bound; one of no elements has none either, or -1.
    if "DW_AT_upper_bound" not in subrange.attributes:
        return _number(subrange, "DW_AT_count")
    return _number(subrange, "DW_AT_upper_bound") + 1 & (1 << 64) - 1


def _place(member: Any) -> tuple[int, int]:
    # A member's offset in bits and, if it is a bitfield, its width.
    bits = _number(member, "DW_AT_bit_size")
    if "DW_AT_data_bit_offset" in member.attributes:
        return _number(member, "DW_AT_data_bit_offset"), bits
    location = member.attributes.get("DW_AT_data_member_location")
    start = 8 * _location(location.value) if location else 0
    if not bits:
        return start, 0
    # Until DWARF 3 counted from the most significant bit of what holds the bitfield.
    unit = _number(member, "DW_AT_byte_size") or _size(member)
    return start + 8 * unit - _number(member, "DW_AT_bit_offset") - bits, bits


def _size(die: Any) -> int:
    for _ in range(64):
        die = die.get_DIE_from_attribute("DW_AT_type")
        if "DW_AT_byte_size" in die.attributes:
            return _number(die, "DW_AT_byte_size")
    raise ValueError("a bitfield without a size")


def _location(value: Any) -> int:
    if isinstance(value, int):
        return value
    operation, *uleb = value
    if operation != DW_OP_PLUS_UCONST or len(uleb) > 5:
        raise ValueError("a member at a place that is computed")
    return sum((byte & 0x7F) << 7 * index for index, byte in enumerate(uleb))
