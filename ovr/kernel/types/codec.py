"""How each kind of C type is read from guest memory and written to it (see `view.Codec`).

x86-64 is little-endian and its pointers have 8 bytes.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING

from ovr.kernel.types.view import Array, Codec, Pointer, Space, Struct
from ovr.memory.addresses import Gva

if TYPE_CHECKING:
    from ovr.kernel.types.types import Types

__all__ = [
    "Address",
    "Bits",
    "Boolean",
    "Elements",
    "Embedded",
    "Integer",
    "Reference",
    "Text",
    "Unreadable",
]

POINTER_SIZE = 8
POINTER = struct.Struct("<Q").unpack
UNPACK = {
    (size, signed): struct.Struct("<" + (letter.lower() if signed else letter)).unpack
    for size, letter in ((1, "B"), (2, "H"), (4, "I"), (8, "Q"))
    for signed in (False, True)
}


class Integer:
    """An integer or enum of `size` bytes, as `int`."""

    def __init__(self, size: int, *, signed: bool) -> None:
        self.size = size
        self.signed = signed
        self._unpack = UNPACK.get((size, signed), self._unpack_long)

    def load(self, space: Space, address: Gva, via: str) -> int:
        """Read it."""
        value: int = self._unpack(space.read(address, self.size))[0]
        return value

    def _unpack_long(self, data: bytes) -> tuple[int]:
        return (int.from_bytes(data, "little", signed=self.signed),)

    def store(self, space: Space, address: Gva, value: int) -> None:
        """Write it."""
        space.write(address, index(value).to_bytes(self.size, "little", signed=self.signed))


@dataclass(frozen=True)
class Boolean:
    """A ``bool``."""

    size: int

    def load(self, space: Space, address: Gva, via: str) -> bool:
        """Read it."""
        return any(space.read(address, self.size))

    def store(self, space: Space, address: Gva, value: bool) -> None:
        """Write it; 0 and 1 will do."""
        if value not in (False, True):
            raise ValueError("neither true nor false")
        space.write(address, int(value).to_bytes(self.size, "little"))


@dataclass(frozen=True)
class Bits:
    """A bitfield: `count` bits from bit `first` on."""

    first: int
    count: int
    signed: bool

    @property
    def size(self) -> int:
        """The number of bytes that it touches."""
        return (self.first + self.count + 7) // 8

    def load(self, space: Space, address: Gva, via: str) -> int:
        """Read it."""
        value = self._whole(space, address) >> self.first & self._mask
        return value - (self._mask + 1) if self.signed and value >> (self.count - 1) else value

    def store(self, space: Space, address: Gva, value: int) -> None:
        """Write it: a read, change and write of its bytes, which nothing else may change."""
        low = -(1 << (self.count - 1)) if self.signed else 0
        if not low <= index(value) <= low + self._mask:
            raise OverflowError(f"not in {low} .. {low + self._mask}")
        others = self._whole(space, address) & ~(self._mask << self.first)
        whole = others | (value & self._mask) << self.first
        space.write(address, whole.to_bytes(self.size, "little"))

    @property
    def _mask(self) -> int:
        return (1 << self.count) - 1

    def _whole(self, space: Space, address: Gva) -> int:
        return int.from_bytes(space.read(address, self.size), "little")


@dataclass(frozen=True)
class Text:
    """A ``char`` array, as `str` up to the first NUL; bytes that are no UTF-8 survive."""

    size: int

    def load(self, space: Space, address: Gva, via: str) -> str:
        """Read it."""
        text = space.read(address, self.size).partition(b"\0")[0]
        return text.decode(errors="surrogateescape")

    def store(self, space: Space, address: Gva, value: str | bytes) -> None:
        """Write `value`, which must leave room for the NUL; the rest is zeroed."""
        text = value if isinstance(value, bytes) else value.encode(errors="surrogateescape")
        if b"\0" in text or len(text) >= self.size:
            raise ValueError(f"no string of at most {self.size - 1} bytes")
        space.write(address, text.ljust(self.size, b"\0"))


@dataclass(frozen=True)
class Embedded:
    """A struct or union within another one, as `Struct`; assigning copies it, as in C."""

    types: "Types"
    type_id: int
    size: int

    @cached_property
    def view(self) -> type[Struct]:
        """Its view class: made when first used, as types may contain pointers to themselves."""
        return self.types.classes[self.type_id]

    def load(self, space: Space, address: Gva, via: str) -> Struct:
        """Return the view; nothing is read."""
        return self.view(space, address, via)

    def store(self, space: Space, address: Gva, value: Struct) -> None:
        """Copy `value`, a view of the same type, wherever it lies."""
        _check_type(value, self.view)
        space.write(address, value.bytes_())


@dataclass(frozen=True)
class Reference:
    """A pointer to a struct or union, as `Struct`."""

    types: "Types"
    type_id: int
    size: int = POINTER_SIZE

    @cached_property
    def view(self) -> type[Struct]:
        """The view class of its target, made when first used."""
        return self.types.classes[self.type_id]

    def load(self, space: Space, address: Gva, via: str) -> Struct:
        """Read the pointer and return the view of its target."""
        return self.view(space, POINTER(space.read(address, POINTER_SIZE))[0], via)

    def store(self, space: Space, address: Gva, value: Struct | Pointer | int | None) -> None:
        """Make it point to `value`; None is NULL."""
        if isinstance(value, Struct):
            _check_type(value, self.view)
        space.write(address, _address(value).to_bytes(POINTER_SIZE, "little"))


@dataclass(frozen=True)
class Address:
    """A pointer to anything but a struct, as `Pointer`; `target` is None for ``void *``."""

    types: "Types"
    target: Codec | None
    size: int = POINTER_SIZE

    def load(self, space: Space, address: Gva, via: str) -> Pointer:
        """Read it."""
        target = POINTER(space.read(address, POINTER_SIZE))[0]
        return Pointer(self.types, space, target, self.target, via)

    def store(self, space: Space, address: Gva, value: Struct | Pointer | int | None) -> None:
        """Make it point to `value`; None is NULL."""
        space.write(address, _address(value).to_bytes(POINTER_SIZE, "little"))


@dataclass(frozen=True)
class Elements:
    """An array of `count` elements, as `Array`."""

    element: Codec
    count: int

    @property
    def size(self) -> int:
        """The size of all elements in bytes."""
        return self.count * self.element.size

    def load(self, space: Space, address: Gva, via: str) -> Array:
        """Return the view; nothing is read."""
        return Array(space, address, self.element, self.count, via)

    def store(self, space: Space, address: Gva, value: Sequence[object]) -> None:
        """Write all elements; `value` must have exactly as many."""
        if len(value) != self.count:
            raise ValueError(f"{len(value)} values for {self.count} elements")
        for number, item in enumerate(value):
            at = Gva(address + number * self.element.size)
            self.element.store(space, at, item)


@dataclass(frozen=True)
class Unreadable:
    """Types without a value: void, functions, declared but undefined types."""

    name: str
    size: int = 0

    def load(self, space: Space, address: Gva, via: str) -> None:
        """Refuse."""
        raise TypeError(f"{via} is of type {self.name}, which cannot be read")

    def store(self, space: Space, address: Gva, value: object) -> None:
        """Refuse."""
        raise TypeError(f"type {self.name} cannot be written")


def _check_type(value: Struct, wanted: type[Struct]) -> None:
    if not isinstance(value, Struct) or value.type_ != wanted.type_:
        found = value.type_ if isinstance(value, Struct) else type(value).__name__
        raise TypeError(f"a {wanted.type_} is wanted, not a {found}")


def _address(value: Struct | Pointer | int | None) -> int:
    if isinstance(value, Struct | Pointer):
        return value.address_
    return 0 if value is None else index(value)
