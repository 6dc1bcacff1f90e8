"""The side of ``ovr warm``: starting and ending the standby process of a VM."""

import subprocess
import sys
from typing import Final

from ovr.standby.messages import StandbyError, send, version
from ovr.standby.place import connect
from ovr.standby.proof import meet

__all__ = ["stand_by", "stand_down"]

_MODULE: Final = "ovr.cli.standby"
_PATIENCE: Final = 30.0  # seconds; loading takes less than one


def stand_by(qemu_pid: int) -> None:
    """Keep a process standing by as long as this VM lives: the present one, or a new one.

    Raises:
        StandbyError: none could be started; the message has the reason.
    """
    if _order(b"keep", qemu_pid):
        return
    command = [sys.executable, "-m", _MODULE, str(qemu_pid)]
    try:
        started = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=_PATIENCE, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StandbyError(str(error)) from error
    # Another command may have started one first.
    if started.returncode and not _order(b"keep", qemu_pid):
        said = started.stderr.strip().splitlines() or [f"it ended with {started.returncode}"]
        raise StandbyError(said[-1])


def stand_down(qemu_pid: int) -> None:
    """End the standby of this VM."""
    _order(b"drop", qemu_pid)


def _order(word: bytes, pid: int) -> bool:
    try:
        with connect() as server:
            inbox = meet(server)
            send(server, [word, version(), b"%d" % pid])
            return inbox.wait().fields == [b"done"]
    except (OSError, StandbyError):
        return False
