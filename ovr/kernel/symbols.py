"""Symbols by name, in whatever table they came; and the search that all name tables share."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovr.memory.addresses import Gva

__all__ = ["Addresses", "SymbolTable", "matching"]

Addresses = NDArray[np.uint64]
Places = NDArray[np.integer[Any]]


def matching(
    text: NDArray[np.uint8], starts: Places, name: bytes, sizes: Places | None = None
) -> list[int]:
    """Return which of `starts` are places where `name` stands in `text`, ascending.

    A kernel has 150 000 names. A dict of them takes longer to make than a restore has use for;
    this takes a fraction of a millisecond a name.

    Args:
        text: many names, each with a terminator.
        starts: where in `text` they start; what lies outside of it matches nothing.
        name: one name with its terminator.
        sizes: how long each is, terminator included, where that is known: it saves time.
    """
    left = np.flatnonzero(starts <= len(text) - len(name) if sizes is None else sizes == len(name))
    for place in reversed(range(len(name))):  # few names have the terminator at the same place
        left = left[text[starts[left] + place] == name[place]]
    return [int(index) for index in left]


class SymbolTable:
    """Symbols by name; several may share one, as static functions do.

    Args:
        names: all names, each with its terminator.
        starts: where in `names` the name of each symbol starts.
        addresses: the address of each symbol.
        terminator: the byte after each name.
        sizes: how long each name is, terminator included, where that is known.
    """

    def __init__(
        self,
        names: NDArray[np.uint8],
        starts: Places,
        addresses: Addresses,
        terminator: bytes,
        sizes: Places | None = None,
    ) -> None:
        self._names = names
        self._starts = starts
        self._addresses = addresses
        self._terminator = terminator
        self._sizes = sizes
        self._known: dict[str, list[Gva]] = {}

    def __len__(self) -> int:
        """The number of symbols."""
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[str, Gva]]:
        """Yield every (name, address) in the order of the table."""
        names = self._names.tobytes()
        for start, address in zip(self._starts.tolist(), self._addresses.tolist(), strict=True):
            name = names[start : names.find(self._terminator, start)]
            yield name.decode("ascii", "surrogateescape"), Gva(address)

    def all(self, name: str) -> list[Gva]:
        """Return the addresses of all symbols of this name."""
        known = self._known.get(name)
        if known is None:
            whole = name.encode("ascii", "surrogateescape") + self._terminator
            found = matching(self._names, self._starts, whole, self._sizes)
            known = self._known[name] = [Gva(int(self._addresses[index])) for index in found]
        return known

    def get(self, name: str) -> Gva | None:
        """Return the address of the first symbol of this name, or None."""
        return next(iter(self.all(name)), None)
