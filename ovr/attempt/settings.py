"""Write values into kernel objects from outside, and verify them."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from reprlib import repr as short
from typing import Any, Final

from ovr.attempt.undo import Recording
from ovr.errors import VerifyMismatch
from ovr.kernel import types_that_fit
from ovr.state.guest import GuestTree
from ovr.state.settings import Setting
from ovr.vm.hold import Holder

__all__ = ["verify", "write"]

_HOLD_SECONDS: Final = 0.01
"""Length of a hold for settings; to begin and end one takes 2 ms."""


def write(
    settings: Sequence[Setting],
    tree: Callable[[], GuestTree],
    holder: Holder,
    recording: Recording,
) -> None:
    """Write the values, as many in one hold as its time allows.

    No kernel code runs in the guest during a hold, so an object that was found stays what it is
    until it is written. Between holds the OOM killer may end a stopped task and free its objects.

    Args:
        settings: the values.
        tree: looks for the tree anew.
        holder: holds the VM.
        recording: gets the writes.

    Raises:
        AttemptFailed: the tree is not as in the images.
        DoesNotFit: a value that this guest's kernel cannot hold.
        GuestFault: invalid kernel objects in the guest.
        KernelNotFound: invalid types of its kernel.
    """
    _rehearse(settings, tree())
    left = deque(settings)
    while left:
        with holder.held():
            until = time.perf_counter() + _HOLD_SECONDS
            guest = tree()
            while left:
                setting = left.popleft()
                kind, target = setting.kind, _target(setting, guest)
                with recording.of(kind, setting.binding, target), types_that_fit():
                    kind.write(target, setting.value)
                if time.perf_counter() >= until:
                    break
    recording.log_fields()


def _rehearse(settings: Iterable[Setting], guest: GuestTree) -> None:
    # Reads all that will be written: types are parsed when first used, which must not be in a hold.
    for setting in settings:
        _read(setting, guest)


def _read(setting: Setting, guest: GuestTree) -> Any:
    target = _target(setting, guest)
    with types_that_fit():
        return setting.kind.read(target)


@types_that_fit()
def _target(setting: Setting, guest: GuestTree) -> Any:
    return setting.binding.find(guest)


def verify(settings: Iterable[Setting], guest: GuestTree) -> None:
    """Read everything back.

    Raises:
        VerifyMismatch: a value is not what was written.
    """
    for setting in settings:
        found = _read(setting, guest)
        if found != setting.value:
            raise VerifyMismatch(
                f"{setting.binding.label}: {setting.kind.name} is {short(found)} instead of"
                f" {short(setting.value)}",
                "restore again; if it happens again, report it",
            )
