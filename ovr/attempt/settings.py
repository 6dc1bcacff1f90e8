"""Values of kernel objects, written from outside and verified."""

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
"""After which a hold for settings ends: to begin and end one takes 2 ms."""


def write(
    settings: Sequence[Setting],
    tree: Callable[[], GuestTree],
    holder: Holder,
    recording: Recording,
) -> None:
    """Write the values, as many in one hold as its time allows.

    In the hold no kernel code runs in the guest, so that an object is what it was found to be
    until it is written: a stopped task that the OOM killer ends meanwhile gives its objects back.

    Args:
        settings: the values.
        tree: looks at the tree anew.
        holder: keeps the VM still.
        recording: what is written is recorded there.

    Raises:
        RestoreFailed: the tree is not what the images say.
        DoesNotFit: a value that this guest's kernel cannot hold.
        GuestFault: the guest's kernel objects make no sense.
        KernelNotFound: its types make no sense.
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
