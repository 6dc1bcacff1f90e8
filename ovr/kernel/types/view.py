"""Kernel objects in guest memory that read and write like C.

A `Struct` is an object in guest memory, reached directly or through a pointer: C's ``task.fs`` and
``task->fs`` are both ``task.fs`` here. Each attribute is a read or a write of guest memory at the
offset that the guest's own BTF gives, checked against the size and the range of the type::

    task.fs.umask = 0o137
    for i, limit in enumerate(limits):
        task.signal.rlim[i].rlim_cur = limit

Members come back as Python values: integers, enums and bitfields as `int`, ``char`` arrays as
`str` up to their NUL, structs and pointers to structs as `Struct`, other arrays as `Array`, other
pointers as `Pointer`. Attributes that are not the kernel's end in an underscore. Members
of anonymous structs and unions are members of the type that contains these.

In the body of a class Python rewrites names like ``task.__state``; there, write
``getattr(task, "__state")``.

The kernel may run meanwhile: two reads may see two states. A comment at each write states why
nothing else writes there at the same time.
"""

from collections.abc import Callable, Iterator
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ovr.errors import GuestFault, KernelNotFound, OvrError
from ovr.memory.addresses import Gva

if TYPE_CHECKING:
    from ovr.kernel.types.types import Types

__all__ = [
    "Array",
    "Codec",
    "DoesNotFit",
    "NoSuchMember",
    "OutOfBounds",
    "Pointer",
    "Recorder",
    "Space",
    "Struct",
    "address_of",
    "container_of",
    "member_property",
]


class NoSuchMember(KernelNotFound, AttributeError):
    """The guest kernel's type has no such member; callers may try another layout."""


class DoesNotFit(OvrError, ValueError):
    """The member's type cannot hold the value; nothing was written."""


class OutOfBounds(GuestFault, IndexError):
    """An index is outside of a guest array."""


Recorder = Callable[[str, Gva, bytes, bytes], None]
"""Called with a member's name, its address, and its bytes as they are and as they are to be."""


class Space(Protocol):
    """Guest memory by GVA: the part of `ovr.memory.paging.AddressSpace` that views use."""

    @property
    def recorder(self) -> Recorder | None:
        """Called with every value before it is written, if set."""

    def read(self, gva: Gva, size: int) -> bytes:
        """Read `size` bytes; `GuestFault` if they are not mapped."""

    def write(self, gva: Gva, data: bytes) -> None:
        """Write `data`; `GuestFault` if it would not be mapped."""


class Codec(Protocol):
    """How values of one C type are read from guest memory and written to it."""

    @property
    def size(self) -> int:
        """The size of the type in bytes."""

    def load(self, space: Space, address: Gva, via: str) -> Any:
        """Return the value at `address`; `via` is the name of its member."""

    def store(self, space: Space, address: Gva, value: Any) -> None:
        """Write `value`. Raises `ValueError` or `OverflowError` if it does not fit."""


class Struct:
    """A struct or union in guest memory; false if its address is NULL.

    Every type has its own subclass, made by `Types`, with a property for each member.

    Attributes:
        address_: its GVA.
        space_: its address space.
        via_: the member through which it was reached, for messages.
        id_: its type's id in BTF; `type_` its name, `size_` its size in bytes.
        types_: all types of its kernel.
    """

    __slots__ = ("address_", "space_", "via_")
    id_: ClassVar[int] = 0
    type_: ClassVar[str] = "struct"
    size_: ClassVar[int] = 0
    types_: ClassVar["Types"]

    def __init__(self, space: Space, address: Gva, via: str = "") -> None:
        self.space_ = space
        self.address_ = address
        self.via_ = via

    def __bool__(self) -> bool:
        return self.address_ != 0

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Struct):
            return self.address_ == other.address_ and self.type_ == other.type_
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.address_)

    def __repr__(self) -> str:
        return f"<{self.type_} at {self.address_:#x}>"

    def __getattr__(self, name: str) -> Any:
        # Only called for names without a property.
        raise NoSuchMember(
            f"{self.type_} has no member {name} in this guest's kernel",
            "is the guest's kernel supported? see the support matrix",
        )

    if TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __getitem__(self, index: int) -> "Struct":
        """Return element `index` of the array whose first element this is (C: ``p[index]``)."""
        return type(self)(self.space_, Gva(self.address_ + index * self.size_), self.via_)

    __iter__ = None  # indexing makes no sequence of it

    def cast_(self, type_name: str) -> Any:
        """Return an object of another type at the same address."""
        return self.types_.pointer(type_name, self.space_, self.address_, self.via_)

    def bytes_(self) -> bytes:
        """Return the object's bytes as they lie in guest memory."""
        return self.space_.read(self.address_, self.size_)


class Array:
    """An array in guest memory; every index is checked against its length."""

    __slots__ = ("_codec", "_count", "_space", "_via", "address_")

    def __init__(self, space: Space, address: Gva, codec: Codec, count: int, via: str) -> None:
        self.address_ = address
        self._space = space
        self._codec = codec
        self._count = count
        self._via = via

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._codec.load(self._space, self._at(index), self._via)

    def __setitem__(self, index: int, value: Any) -> None:
        store(self._codec, self._space, self._at(index), value, f"{self._via}[{index}]")

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(self._count))

    def __bytes__(self) -> bytes:
        return self._space.read(self.address_, self._count * self._codec.size)

    def __repr__(self) -> str:
        return f"<{self._count} elements of {self._via} at {self.address_:#x}>"

    def resized(self, count: int) -> "Array":
        """Return the array with another length.

        The length of a trailing array is often kept elsewhere: ``pid->numbers`` has
        ``pid->level + 1`` elements.
        """
        return Array(self._space, self.address_, self._codec, count, self._via)

    def _at(self, index: int) -> Gva:
        if not 0 <= index < self._count:
            raise OutOfBounds(f"{self._via}[{index}]: it has {self._count} elements", self.address_)
        return self.address_ + index * self._codec.size  # type: ignore[return-value] # Gva() is slow


class Pointer:
    """A pointer to anything but a struct; `codec` is None for ``void *`` and functions."""

    __slots__ = ("_codec", "_via", "address_", "space_", "types_")

    def __init__(
        self, types: "Types", space: Space, address: Gva, codec: Codec | None, via: str
    ) -> None:
        self.address_ = address
        self.space_ = space
        self.types_ = types
        self._codec = codec
        self._via = via

    def __bool__(self) -> bool:
        return self.address_ != 0

    def __int__(self) -> int:
        return self.address_

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Pointer | Struct):
            return self.address_ == other.address_
        if isinstance(other, int):
            return self.address_ == other
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.address_)

    def __repr__(self) -> str:
        return f"<pointer {self._via} to {self.address_:#x}>"

    def __getitem__(self, index: int) -> Any:
        """Return element `index` of the target (C: ``p[index]``, ``*p`` is ``p[0]``)."""
        codec = self._target()
        return codec.load(self.space_, Gva(self.address_ + index * codec.size), self._via)

    def __setitem__(self, index: int, value: Any) -> None:
        codec = self._target()
        at = Gva(self.address_ + index * codec.size)
        store(codec, self.space_, at, value, f"{self._via}[{index}]")

    __iter__ = None

    def cast_(self, type_name: str) -> Any:
        """Return the pointer as one to `type_name`."""
        return self.types_.pointer(type_name, self.space_, self.address_, self._via)

    def string_(self, limit: int = 4096) -> bytes:
        """Return the bytes before the NUL that must come within `limit` bytes."""
        text = b""
        while b"\0" not in text:
            if len(text) >= limit:
                raise GuestFault(f"{self._via}: no string of {limit} bytes", self.address_)
            at = Gva(self.address_ + len(text))
            text += self.space_.read(at, min(256 - at % 256, limit - len(text)))
        return text.partition(b"\0")[0]

    def _target(self) -> Codec:
        if not self.address_:
            raise GuestFault(f"{self._via} is NULL", 0)
        if self._codec is None:
            raise TypeError(f"{self._via} points to void: cast it first")
        return self._codec


def address_of(view: Struct, path: str) -> Any:
    """Return a pointer to a member: ``&view->path``; `path` as in ``"rlim[3].rlim_cur"``."""
    return view.types_.address_of(view, path)


def container_of(member: Struct | Pointer, type_name: str, path: str) -> Any:
    """Return the struct whose member `path` is at `member` (``container_of()``)."""
    address = Gva(member.address_ - member.types_.offsetof(type_name, path))
    return member.types_.pointer(type_name, member.space_, address)


def member_property(path: str, offset: int, codec: Codec) -> property:
    """Return the property that reads and writes one member of a `Struct`.

    Args:
        path: the member's name, for messages: ``task_struct.fs``.
        offset: its offset in bytes.
        codec: reads and writes its values.
    """
    load: Any = codec.load

    def get(view: Struct) -> Any:
        address = view.address_
        if not address:
            raise _null(view, path)
        try:
            return load(view.space_, address + offset, path)
        except GuestFault as fault:
            raise _located(view, path, fault) from None

    def put(view: Struct, value: Any) -> None:
        if not view.address_:
            raise _null(view, path)
        try:
            store(codec, view.space_, Gva(view.address_ + offset), value, path)
        except GuestFault as fault:
            raise _located(view, path, fault) from None

    return property(get, put)


def store(codec: Codec, space: Space, address: Gva, value: Any, path: str) -> None:
    """Write a value; errors name the member.

    Raises:
        DoesNotFit: the type cannot hold the value; nothing was written.
        GuestFault: the address is not mapped.
    """
    try:
        codec.store(_Recorded(space, path) if space.recorder else space, address, value)
    except (OverflowError, ValueError) as error:
        raise DoesNotFit(f"{path} = {short(value)}: {error}") from None


class _Recorded:
    # An address space that reports each write to its recorder first.
    def __init__(self, space: Space, path: str) -> None:
        self.recorder = space.recorder
        self.read = space.read
        self._space = space
        self._path = path

    def write(self, gva: Gva, data: bytes) -> None:
        if self.recorder:
            self.recorder(self._path, gva, self.read(gva, len(data)), data)
        self._space.write(gva, data)


def _null(view: Struct, path: str) -> GuestFault:
    return GuestFault(f"{view.via_ or 'pointer to ' + view.type_} is NULL: no {path}", 0)


def _located(view: Struct, path: str, fault: GuestFault) -> GuestFault:
    where = f"{path} of the object at {view.address_:#x}"
    return GuestFault(f"{where}: {fault}", fault.address, fault.hint)
