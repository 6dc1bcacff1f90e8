"""Errors of holds: the VM cannot be held, or was not held until the end."""

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Final

from ovr.errors import AttemptFailed, CheckFailed, HoldBroken, OvrError, VmUnreachable
from ovr.guest.client.session import one_line

__all__ = ["BECOME", "Result", "hold_error"]

BECOME: Final = "run as root, or as the user that runs QEMU, on its host"
_AGAIN: Final = "the VM runs on; restore again"


class Result(IntEnum):
    """``enum hold_result`` of native/hold.h."""

    DONE = 0
    GONE = 1
    TRACED = 2
    FORBIDDEN = 3
    STUCK = 4
    TERMINAL = 5
    RAN = 6
    BROKEN = 7
    LOST = 8
    SILENT = 9
    CROWDED = 10


_ERRORS: Final[Mapping[Result, tuple[type[OvrError], str, str]]] = {
    Result.GONE: (VmUnreachable, "{qemu} has ended", ""),
    Result.TRACED: (CheckFailed, "{qemu} is traced by {who}", "end it, and restore again"),
    Result.FORBIDDEN: (CheckFailed, "{qemu} may be neither traced nor signalled", BECOME),
    Result.STUCK: (
        AttemptFailed,
        "{who} of {qemu} does not stop within {patience:g} s",
        "is its host out of memory, or its disk stuck?",
    ),
    Result.TERMINAL: (
        CheckFailed,
        "{qemu} may not be traced, and has a terminal, whose shell may resume it inside of a hold",
        "run as root (CAP_SYS_PTRACE), or start QEMU without a terminal (setsid)",
    ),
    Result.RAN: (HoldBroken, "{qemu} was resumed by another process while it was held", _AGAIN),
    Result.BROKEN: (HoldBroken, "the VM was held for longer than {bound:g} s; broken off", _AGAIN),
    Result.LOST: (HoldBroken, "the process that holds the VM was killed", _AGAIN),
    Result.SILENT: (HoldBroken, "the process that holds the VM did not answer", _AGAIN),
    Result.CROWDED: (CheckFailed, "{qemu} has more than 4096 threads", "report it"),
}


def hold_error(result: int, pid: int, who: int, *, bound: float, patience: float) -> OvrError:
    """Return the error for a result.

    Args:
        result: a `Result`, not `Result.DONE`.
        pid: of QEMU.
        who: the process or thread in question: QEMU's tracer, or one of its threads.
        bound: seconds that a hold may last.
        patience: seconds that a thread may take to stop.
    """
    kind, text, hint = _ERRORS[Result(result)]
    name = _named("thread" if result == Result.STUCK else "process", who)
    error = kind(text.format(qemu=f"QEMU {pid}", who=name, bound=bound, patience=patience), hint)
    if isinstance(error, HoldBroken):
        # keep_held() in native/tracer.c: it awaits writers before it lets the VM run. Nobody does
        # if the tracer dies.
        error.after_writes = result == Result.BROKEN
    return error


def _named(what: str, tid: int) -> str:
    try:
        name = Path(f"/proc/{tid}/comm").read_text(errors="replace").strip()
    except OSError:
        return f"{what} {tid}"
    return f"{what} {tid} ({one_line(name)})"
