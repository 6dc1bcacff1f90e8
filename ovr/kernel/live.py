"""Reading what a running guest may change meanwhile."""

from collections.abc import Callable
from typing import Final, TypeVar

from ovr.errors import GuestFault

__all__ = ["settled"]

ATTEMPTS: Final = 8

Value = TypeVar("Value")


def settled(read: Callable[[], Value]) -> Value:
    """Return what `read` returns; try again if the guest frees what is being read.

    Args:
        read: walks guest structures and has no side effects.

    Raises:
        GuestFault: they make no sense, however often they are read.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return read()
        except GuestFault:
            continue
    return read()
