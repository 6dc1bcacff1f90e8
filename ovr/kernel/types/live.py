"""Reading what a running guest may change meanwhile, and whose types may be anything."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from ovr.errors import GuestFault, KernelNotFound, OvrError
from ovr.kernel.types.view import Array, Pointer

__all__ = ["Deadline", "settled", "types_that_fit"]

ATTEMPTS: Final = 8
PATIENCE: Final = 5.0
"""Seconds after which nothing is tried again: a guest that makes us read in vain for so long lies,
or is busier than we can be."""

WALK_SECONDS: Final = 120.0
"""What one walk along a list or a tree may take, with all that is done at its entries."""

_GUEST_VALUES: Final = (int, str, bytes, Array, Pointer)
"""What a member is loaded as that is not a struct, which has an error of its own."""

Value = TypeVar("Value")


class Deadline:
    """When a walk must have ended: what a guest claims to have may be longer than we can read.

    Args:
        what: what is walked, for the message.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._until = time.monotonic() + WALK_SECONDS

    def check(self, address: int) -> None:
        """Go on, at the entry at `address`.

        Raises:
            GuestFault: the time is over.
        """
        if time.monotonic() > self._until:
            raise GuestFault(
                f"{self._what} has no end within {WALK_SECONDS:g} s: at {address:#x}", address,
                "does the guest lie? if the host is only busy, try again when it is not",
            )  # fmt: skip


def settled(read: Callable[[], Value]) -> Value:
    """Return what `read` returns; try again if the guest frees what is being read.

    Args:
        read: walks guest structures and has no side effects.

    Raises:
        GuestFault: they make no sense, however often they are read.
        KernelNotFound: the guest's types are not those of such structures.
    """
    until = time.monotonic() + PATIENCE
    for _ in range(ATTEMPTS - 1):
        try:
            with types_that_fit():
                return read()
        except GuestFault:
            if time.monotonic() > until:
                raise
    with types_that_fit():
        return read()


@contextmanager
def types_that_fit() -> Iterator[None]:
    """Report a guest value of an unexpected type as an error of the guest's kernel.

    Members have the types that the guest's BTF says. Where one that must be a pointer is a number,
    Python notices it. The body must do nothing but read and write guest objects, or a mistake of
    ours is reported as one of the guest's.

    Raises:
        KernelNotFound: some type is not what all kernels have there.
    """
    try:
        yield
    except OvrError:
        raise
    except AttributeError as error:
        if not isinstance(error.obj, _GUEST_VALUES):
            raise
        raise _misfit(error) from error
    except (TypeError, LookupError, ValueError, ArithmeticError) as error:
        raise _misfit(error) from error


def _misfit(error: Exception) -> KernelNotFound:
    return KernelNotFound(
        f"the guest kernel's types make no sense: {type(error).__name__}: {error}",
        "is the guest's kernel supported? see the support matrix",
    )
