"""The base class of the protocol's messages."""

from typing import Any, ClassVar, Self, dataclass_transform

__all__ = ["Message"]


@dataclass_transform(frozen_default=True)
class Message:
    """A message; its fields are declared in the class, as in a frozen dataclass.

    Not a dataclass, because compiling six functions for each class takes a tenth of a command's
    start-up time.

    Attributes:
        op: its name on the wire.
        field_names: the names of its fields, in order.
    """

    op: ClassVar[str] = ""
    field_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.op = cls.__name__.lower()
        cls.field_names = tuple(cls.__annotations__)

    def __init__(self, *values: Any, **named: Any) -> None:
        given = dict(zip(self.field_names, values, strict=False))
        both = given.keys() & named.keys()
        given |= named
        absent = [
            name for name in self.field_names if name not in given and not hasattr(self, name)
        ]
        if (
            both
            or absent
            or len(values) > len(self.field_names)
            or not given.keys() <= {*self.field_names}
        ):
            raise TypeError(f"{type(self).__name__}{self.field_names} from {values} and {named}")
        self.__dict__.update(given)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values in some fields."""
        fields = dict(zip(self.field_names, self._values(), strict=True))
        return type(self)(**fields | changes)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.field_names)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash((self.op, self._values()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.field_names)
        return f"{type(self).__name__}({fields})"
