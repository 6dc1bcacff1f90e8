"""Declare protobuf messages as typed Python classes.

A class decorated with `entry` is its own schema: the field calls give number, label and wire type,
the annotations the types for the type checker. At run time the decorator returns the class that the
protobuf library makes from it, so there is one source for both and neither ``.proto`` files nor
generated code. Fields without a declaration survive a rewrite.

Text is declared as `BYTES`, because the names that CRIU stores need not be UTF-8, and enumerations
as `UINT32`, so that values newer than this code are kept. The wire format is the same.
"""

from collections.abc import Iterator, MutableSequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, cast

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

__all__ = [
    "BOOL",
    "BYTES",
    "INT32",
    "SINT32",
    "SINT64",
    "UINT32",
    "UINT64",
    "Composites",
    "Message",
    "Scalars",
    "copy_of",
    "entry",
    "optional",
    "repeated",
    "required",
]

BOOL: Final = FieldDescriptorProto.TYPE_BOOL
BYTES: Final = FieldDescriptorProto.TYPE_BYTES
INT32: Final = FieldDescriptorProto.TYPE_INT32
SINT32: Final = FieldDescriptorProto.TYPE_SINT32
SINT64: Final = FieldDescriptorProto.TYPE_SINT64
UINT32: Final = FieldDescriptorProto.TYPE_UINT32
UINT64: Final = FieldDescriptorProto.TYPE_UINT64

M = TypeVar("M", bound=Message)
Scalars = MutableSequence


class Composites(Protocol[M]):
    """A repeated field of messages, as the protobuf library returns it."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[M]: ...
    def __getitem__(self, index: int) -> M: ...
    def __delitem__(self, index: int | slice) -> None: ...
    def add(self, **fields: Any) -> M:
        """Append a new message and return it."""

    def extend(self, messages: "list[M]") -> None:
        """Append copies of `messages`."""


@dataclass(frozen=True)
class _Field:
    number: int
    label: int
    kind: Any  # a TYPE_ constant, an entry class, or the name of the class being declared


def required(number: int, kind: Any) -> Any:
    """Declare a field without which the message is damaged."""
    return _Field(number, FieldDescriptorProto.LABEL_REQUIRED, kind)


def optional(number: int, kind: Any) -> Any:
    """Declare a field that may be absent: test with ``HasField``."""
    return _Field(number, FieldDescriptorProto.LABEL_OPTIONAL, kind)


def repeated(number: int, kind: Any) -> Any:
    """Declare a field that may occur any number of times."""
    return _Field(number, FieldDescriptorProto.LABEL_REPEATED, kind)


_PACKAGE = "ovr"
_pool = DescriptorPool()  # not the default one, where other declarations of CRIU's messages may be


def entry(cls: type[M]) -> type[M]:
    """Return the protobuf class that the fields of `cls` describe."""
    file = FileDescriptorProto(name=f"{cls.__name__}.proto", package=_PACKAGE, syntax="proto2")
    message = file.message_type.add(name=cls.__name__)
    for name, field in vars(cls).items():
        if isinstance(field, _Field):
            _declare(file, message.field.add(name=name, number=field.number), field)
    _pool.AddSerializedFile(file.SerializeToString())
    descriptor = _pool.FindMessageTypeByName(f"{_PACKAGE}.{cls.__name__}")
    return cast("type[M]", GetMessageClass(descriptor))


def _declare(file: FileDescriptorProto, proto: FieldDescriptorProto, field: _Field) -> None:
    proto.label = cast("Any", field.label)
    if isinstance(field.kind, int):
        proto.type = cast("Any", field.kind)
        return
    proto.type = FieldDescriptorProto.TYPE_MESSAGE
    if isinstance(field.kind, str):
        proto.type_name = f".{_PACKAGE}.{field.kind}"
        return
    descriptor = field.kind.DESCRIPTOR
    proto.type_name = f".{descriptor.full_name}"
    if descriptor.file.name not in file.dependency:
        file.dependency.append(descriptor.file.name)


def copy_of(message: M) -> M:
    """Return a copy of `message` that may be changed, unknown fields included."""
    twin = type(message)()
    twin.CopyFrom(message)
    return twin
