"""The guest kernel's types by their C names: sizes, offsets, enumerators, and view classes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from ovr.errors import KernelNotFound
from ovr.kernel.types import btf
from ovr.kernel.types.btf import Btf, Kind
from ovr.kernel.types.codec import (
    Address,
    Bits,
    Boolean,
    Elements,
    Embedded,
    Integer,
    Reference,
    Text,
    Unreadable,
)
from ovr.kernel.types.view import Codec, NoSuchMember, Pointer, Space, Struct, member_property
from ovr.memory.addresses import Gva

__all__ = ["NoSuchType", "Types"]

MAX_DEPTH: Final = 32
MAX_MEMBERS: Final = 1 << 16
NAME: Final = re.compile(r"\s*(?:(struct|union|enum)\s+)?(\w[\w ]*?)\s*(\**)\s*")
OURS: Final = frozenset(dir(Struct))  # a member of a guest type must not hide these
STEP: Final = re.compile(r"\.?(\w+)|\[(\d+)\]")
SPELLINGS: Final = {  # compilers' names of the types that people write
    "short": "short int",
    "unsigned short": "short unsigned int",
    "unsigned": "unsigned int",
    "long": "long int",
    "unsigned long": "long unsigned int",
    "long long": "long long int",
    "unsigned long long": "long long unsigned int",
}
KEYWORDS: Final[dict[str | None, tuple[tuple[Kind, ...], ...]]] = {
    "struct": ((Kind.STRUCT,),),
    "union": ((Kind.UNION,),),
    "enum": ((Kind.ENUM, Kind.ENUM64),),
    None: ((Kind.STRUCT, Kind.UNION), (Kind.TYPEDEF, Kind.INT), (Kind.ENUM, Kind.ENUM64)),
}


class NoSuchType(KernelNotFound, LookupError):
    """The guest kernel has no type of this name."""


@dataclass(frozen=True, slots=True)
class Field:
    """A member as seen from the outermost struct: `offset` in bytes, `first` bit of a bitfield."""

    type_id: int
    offset: int
    first: int
    bits: int


class _Classes(dict[int, type[Struct]]):
    # The view class of each struct type, made when first used.

    def __init__(self, types: "Types") -> None:
        self._types = types

    def __missing__(self, type_id: int) -> type[Struct]:
        made = self[type_id] = self._types.make_class(type_id)
        return made


class Types:
    """The guest's BTF, as view classes and numbers.

    Type names are written as in C: ``"struct task_struct"``, ``"unsigned long"``, ``"pid_t"``,
    ``"struct file **"``. Without a keyword, structs and unions come first.

    Args:
        types: the parsed BTF.

    Attributes:
        btf: the same.
        classes: the `Struct` subclass of each struct and union, by type id.
    """

    def __init__(self, types: Btf) -> None:
        self.btf = types
        self.classes: Mapping[int, type[Struct]] = _Classes(self)
        self._codecs: dict[int, Codec] = {}
        self._fields: dict[int, dict[str, Field]] = {}
        self._ids: dict[str, tuple[int, int]] = {}

    def close(self) -> None:
        """Release the BTF and all views; they cannot be used afterwards.

        View classes, codecs and this object form reference cycles, which would keep some megabytes
        of BTF until the next garbage collection.
        """
        vars(self).clear()

    def __contains__(self, name: str) -> bool:
        try:
            self._lookup(name)
        except NoSuchType:
            return False
        return True

    def sizeof(self, name: str) -> int:
        """Return ``sizeof(name)`` in bytes."""
        return self.codec(name).size

    def offsetof(self, name: str, path: str) -> int:
        """Return ``offsetof(name, path)`` in bytes; `path` as in ``"pid_links[1].next"``.

        Raises:
            NoSuchMember: the type has no such member.
        """
        return self._locate(self._lookup(name)[0], path)[0]

    def enum(self, name: str) -> Mapping[str, int]:
        """Return the values of an enum, by the names of its enumerators."""
        found = self.btf.resolve(self._lookup(name)[0])[1]
        if not isinstance(found, btf.Enum):
            raise NoSuchType(f"{name} is no enum in this guest's kernel")
        return MappingProxyType(found.values)

    def struct(self, name: str) -> type[Struct]:
        """Return the view class of a struct or union."""
        type_id, found = self.btf.resolve(self._lookup(name)[0])
        if not isinstance(found, btf.Composite):
            raise NoSuchType(f"{name} is no struct in this guest's kernel")
        return self.classes[type_id]

    def codec(self, name: str) -> Codec:
        """Return the codec that reads and writes values of a type."""
        type_id, stars = self._lookup(name)
        codec = self._codec(type_id)
        for _ in range(stars):
            codec = self._pointer_to(codec)
        return codec

    def object(self, name: str, space: Space, address: Gva) -> Any:
        """Return the object of type `name` at `address`: a view, or a scalar's value."""
        return self.codec(name).load(space, address, name)

    def pointer(self, name: str, space: Space, address: Gva, via: str = "") -> Any:
        """Return a pointer to type `name`: a `Struct` if it is one, else a `Pointer`.

        Messages name `via` as the member that the pointer was read from.
        """
        return self._point(self.codec(name), space, address, via or name)

    def variable(self, name: str) -> Codec | None:
        """Return the type of a per-cpu variable, or None: BTF has no other variables."""
        for type_id in self.btf.find(name, Kind.VAR):
            found = self.btf.type(type_id)
            if isinstance(found, btf.Variable):
                return self._codec(found.type)
        return None

    def address_of(self, view: Struct, path: str) -> Any:
        """See `view.address_of`."""
        offset, type_id = self._locate(view.id_, path)
        at = Gva(view.address_ + offset)
        return self._point(self._codec(type_id), view.space_, at, f"{view.type_}.{path}")

    def make_class(self, type_id: int) -> type[Struct]:
        """Make the view class of a struct type; `classes` calls this once for each type."""
        found = self.btf.type(type_id)
        if not isinstance(found, btf.Composite):
            raise NoSuchType(f"type {type_id} is no struct in this guest's kernel")
        name = found.name or "(anonymous)"
        body: dict[str, Any] = {
            "__slots__": (),
            "id_": type_id,
            "type_": f"{found.keyword} {name}",
            "size_": found.size,
            "types_": self,
        }
        for member, field in self.fields(type_id).items():
            if member not in OURS and not member.endswith("__"):
                codec = self._field_codec(field)
                body[member] = member_property(f"{name}.{member}", field.offset, codec)
        return type(name, (Struct,), body)

    def fields(self, type_id: int) -> Mapping[str, Field]:
        """Return all members of a struct by name, those of anonymous members included."""
        fields = self._fields.get(type_id)
        if fields is None:
            fields = {}
            for name, field in self._members(type_id, 0, 0, iter(range(MAX_MEMBERS))):
                fields.setdefault(name, field)
            self._fields[type_id] = fields
        return fields

    def _members(
        self, type_id: int, base: int, depth: int, budget: Iterator[int]
    ) -> Iterator[tuple[str, Field]]:
        # `budget` is shared by all levels: few nested structs can have very many members.
        composite = self.btf.type(type_id)
        if depth > MAX_DEPTH or not isinstance(composite, btf.Composite):
            raise KernelNotFound(f"the guest kernel's BTF is damaged: struct type {type_id}")
        for member in composite.members:
            if next(budget, None) is None:
                raise KernelNotFound("the guest kernel's BTF is damaged: too many members")
            bit = base + member.bit_offset
            if not member.name:
                inner, found = self.btf.resolve(member.type)
                if isinstance(found, btf.Composite):
                    yield from self._members(inner, bit, depth + 1, budget)
            else:
                yield member.name, Field(member.type, bit // 8, bit % 8, member.bits)

    def _field_codec(self, field: Field) -> Codec:
        if not field.bits and not field.first:
            return self._codec(field.type_id)
        found = self.btf.resolve(field.type_id)[1]
        if not isinstance(found, btf.Int | btf.Enum) or not 0 < field.bits <= 8 * found.size:
            return Unreadable("(damaged bitfield)")
        return Bits(field.first, field.bits, found.signed)

    def _codec(self, type_id: int, depth: int = 0) -> Codec:
        codec = self._codecs.get(type_id)
        if codec is None:
            if depth > MAX_DEPTH:
                raise KernelNotFound(f"the guest kernel's BTF is damaged: type {type_id}")
            codec = self._codecs[type_id] = self._make_codec(*self.btf.resolve(type_id), depth)
        return codec

    def _make_codec(  # noqa: PLR0911 - one for each kind
        self, type_id: int, found: btf.Type, depth: int
    ) -> Codec:
        match found:
            case btf.Int(boolean=True):
                return Boolean(found.size)
            case btf.Int() | btf.Enum():
                return Integer(found.size, signed=found.signed)
            case btf.Composite():
                return Embedded(self, type_id, found.size)
            case btf.Array(element, count):
                self.btf.sizeof(type_id)  # plausible?
                target = self.btf.resolve(element)[1]
                if count and isinstance(target, btf.Int) and target.name == "char":
                    return Text(count)
                return Elements(self._codec(element, depth + 1), count)
            case btf.Pointer(target_id):
                return self._pointer_codec(target_id, depth)
            case _:
                return Unreadable(getattr(found, "name", "(unknown)"))

    def _pointer_codec(self, target_id: int, depth: int) -> Codec:
        type_id, target = self.btf.resolve(target_id)
        if isinstance(target, btf.Forward):  # declared here, perhaps defined elsewhere
            kind = Kind.UNION if target.keyword == "union" else Kind.STRUCT
            type_id = next(self.btf.find(target.name, kind), type_id)
            target = self.btf.type(type_id)
        if isinstance(target, btf.Composite):
            return Reference(self, type_id)
        return self._pointer_to(self._codec(type_id, depth + 1))

    def _pointer_to(self, codec: Codec) -> Codec:
        if isinstance(codec, Embedded):
            return Reference(self, codec.type_id)
        return Address(self, None if isinstance(codec, Unreadable) else codec)

    def _point(self, codec: Codec, space: Space, address: Gva, via: str) -> Any:
        if isinstance(codec, Embedded):
            return self.classes[codec.type_id](space, address, via)
        target = None if isinstance(codec, Unreadable) else codec
        return Pointer(self, space, address, target, via)

    def _lookup(self, name: str) -> tuple[int, int]:
        # The type's id, and the number of stars after it.
        found = self._ids.get(name)
        if found is None:
            found = self._ids[name] = self._search(name)
        return found

    def _search(self, name: str) -> tuple[int, int]:
        match = NAME.fullmatch(name)
        if match is None:
            raise NoSuchType(f"{name!r} is no C type name")
        keyword, plain, stars = match.groups()
        if plain == "void" and keyword is None:
            return btf.VOID, len(stars)
        for kinds in KEYWORDS[keyword]:
            for type_id in self.btf.find(SPELLINGS.get(plain, plain), *kinds):
                return type_id, len(stars)
        raise NoSuchType(
            f"the guest's kernel has no type {name}",
            "is the guest's kernel supported? see the support matrix",
        )

    def _locate(self, type_id: int, path: str) -> tuple[int, int]:
        # The offset of a member path in bytes, and the member's type.
        offset = at = 0
        while at < len(path):
            step = STEP.match(path, at)
            if step is None:
                raise ValueError(f"{path!r} is no member path")
            at = step.end()
            type_id, found = self.btf.resolve(type_id)
            name, index = step.groups()
            if index is not None and isinstance(found, btf.Array):
                type_id = found.element
                offset += int(index) * self.btf.sizeof(type_id)
            elif name is not None and isinstance(found, btf.Composite):
                field = self.fields(type_id).get(name)
                if field is None or field.bits:
                    raise NoSuchMember(f"{found.keyword} {found.name} has no member {name}")
                offset += field.offset
                type_id = field.type_id
            else:
                raise NoSuchMember(f"{path!r} does not fit the guest kernel's types")
        return offset, type_id
