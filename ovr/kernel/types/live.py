"""Reading memory that a running guest changes meanwhile, with types that may be wrong."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from ovr.errors import GuestFault, KernelNotFound, OvrError
from ovr.kernel.types.view import Array, Pointer

__all__ = ["Deadline", "settled", "types_that_fit"]

ATTEMPTS: Final = 8
PATIENCE: Final = 5.0
"""Seconds after which a read is not tried again: the guest is hostile, or changes too fast."""

WALK_SECONDS: Final = 120.0
"""Limit in seconds for a walk along a list or a tree, including the work at its entries."""

_GUEST_VALUES: Final = (int, str, bytes, Array, Pointer)
"""Values of members that are no structs: these lack attributes that the caller uses."""

Value = TypeVar("Value")


class Deadline:
    """The time limit of a walk: a hostile guest's list may be too long to be read.

    Args:
        what: the name of the list or tree, for the message.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._until = time.monotonic() + WALK_SECONDS

    def check(self, address: int) -> None:
        """Check the time, at the entry at `address`.

        Raises:
            GuestFault: the time is over.
        """
        if time.monotonic() > self._until:
            raise GuestFault(
                f"{self._what} has no end within {WALK_SECONDS:g} s: at {address:#x}", address,
                "is the guest hostile? if the host is only busy, try again later",
            )  # fmt: skip


def settled(read: Callable[[], Value]) -> Value:
    """Return the result of `read`; call it again if the guest frees objects that it reads.

    Args:
        read: walks guest structures and has no side effects.

    Raises:
        GuestFault: they are invalid each time they are read.
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

    Members have the types in the guest's BTF. Python raises an error if a number takes the place
    of a pointer. The body must only read and write guest objects, or a bug in ovr is reported
    as an unsupported kernel.

    Raises:
        KernelNotFound: a type differs from that in all supported kernels.
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
        f"the guest kernel's types are invalid: {type(error).__name__}: {error}",
        "is the guest's kernel supported? see the support matrix",
    )
