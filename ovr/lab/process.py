"""Processes that outlive the command that started them, identified by pid and start time.

psutil has a start time too, but in seconds since 1970, computed from the host's clock: it changes
when that is set, and the state file of a VM keeps it for days.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ovr.errors import LabError

__all__ = ["Process", "await_socket", "last_line", "spawn"]


@dataclass(frozen=True)
class Process:
    """A process, identified by its pid and its start time, since pids are reused.

    Attributes:
        pid: its pid.
        started: field 22 of ``/proc/PID/stat``, in clock ticks since the host booted.
    """

    pid: int
    started: int

    @classmethod
    def find(cls, pid: int) -> "Process":
        """Return the process that has this pid at present.

        Raises:
            ProcessLookupError: there is none, or it is a zombie.
        """
        try:
            # The name may contain any character; the last ")" of the line ends it.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError as error:
            raise ProcessLookupError(f"no process {pid}") from error
        if fields[0] in "ZX":
            raise ProcessLookupError(f"process {pid} is dead")
        return cls(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        try:
            return Process.find(self.pid) == self
        except ProcessLookupError:
            return False

    def end(self, patience: float = 5.0) -> None:
        """End it, if it runs: SIGTERM, and SIGKILL `patience` seconds later."""
        with contextlib.suppress(ProcessLookupError), _handle(self.pid) as handle:
            # Checked while the handle is held, so that it is the same process.
            signals = (signal.SIGTERM, signal.SIGKILL) if self.alive else ()
            for number in signals:
                signal.pidfd_send_signal(handle, number)
                if select.select([handle], [], [], patience)[0]:
                    break
        with contextlib.suppress(ChildProcessError):  # ours to reap if we started it
            os.waitpid(self.pid, os.WNOHANG)


@contextlib.contextmanager
def _handle(pid: int) -> Iterator[int]:
    handle = os.pidfd_open(pid)
    try:
        yield handle
    finally:
        os.close(handle)


def spawn(command: Sequence[str], log: Path) -> Process:
    """Start a daemon in a session of its own, its output going to the file `log`.

    Raises:
        LabError: the program cannot be started.
    """
    new = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions: list[tuple[int, int, str, int, int] | tuple[int, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), new, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    try:
        pid = os.posix_spawn(
            command[0], list(command), os.environ, file_actions=actions, setsid=True
        )
        return Process.find(pid)
    except OSError as error:
        raise LabError(f"{command[0]} cannot be started: {error}") from error


def await_socket(path: Path, process: Process, log: Path, patience: float = 10.0) -> None:
    """Wait until the unix socket `path` exists; end the process if it does not appear.

    Raises:
        LabError: the process died, or did not make the socket in time.
    """
    deadline = time.monotonic() + patience
    while not path.is_socket():
        dead = not process.alive
        if dead or time.monotonic() > deadline:
            process.end()
            what = "its maker died" if dead else f"it did not appear within {patience:g} s"
            raise LabError(f"no socket {path.name}, {what}: {last_line(log)}")
        time.sleep(0.02)


def last_line(log: Path, lines: int = 1) -> str:
    """Return the last lines of a log that are not empty, joined to one."""
    try:
        text = log.read_bytes()[-8192:].decode(errors="replace")
    except OSError:
        return "(no log)"
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-lines:])
