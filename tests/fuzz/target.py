"""A fuzz target in Python, and the errors that an input may raise."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ovr.errors import OvrError

__all__ = ["Input", "Target"]


@dataclass(frozen=True)
class Target:
    """A target.

    Attributes:
        name: what it is called on the command line.
        seeds: makes inputs to begin with.
        one: runs one input; may raise `OvrError`, and `allowed` errors, and nothing else.
        allowed: errors that the interface promises besides.
        native: whether it runs with the extension built with sanitizers.
        longest: most bytes of an input.
    """

    name: str
    seeds: Callable[[], Iterable[bytes]]
    one: Callable[[bytes], None]
    allowed: tuple[type[Exception], ...] = ()
    native: bool = False
    longest: int = 4096

    def run(self, data: bytes) -> bool:
        """Run one input; tell whether there was a result instead of a refusal."""
        try:
            self.one(data)
        except (OvrError, *self.allowed):
            return False
        return True


class Input:
    """An input, taken piece by piece; zeros when it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def bytes(self, size: int) -> bytes:
        """At most `size` bytes, as many as there are."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def number(self, size: int = 1) -> int:
        """A little-endian number of `size` bytes."""
        return int.from_bytes(self.bytes(size), "little")

    def rest(self) -> bytes:
        """All that is left."""
        return self.bytes(len(self._data))
