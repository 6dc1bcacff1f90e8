"""Holding the VM still for a bounded moment, and letting it go whatever happens to us.

A hold stops all threads of QEMU (SIGSTOP), the vCPUs among them: no page table entry and no `struct
page` changes, so what was checked stays true until the hold ends (SIGCONT). The guest sees a moment
without CPU time, as from a busy host. QMP's ``stop`` would do too, but takes five times as long,
tells every management tool, and stops and restarts the guest's vhost-user devices, over which
vhost-device-vsock loses its queues (seen: dead within 100 holds under traffic).

If this process is killed in that moment, a guardian (a shell of two lines) sends the SIGCONT.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Final, Self

from ovr.errors import CheckFailed, RestoreFailed, VmUnreachable
from ovr.vm.qmp import Monitor

__all__ = ["Holder"]

# Reads our word for the VM's state until we close the pipe, which the kernel does if we die.
_GUARDIAN: Final = 'while read -r word; do state=$word; done; [ "$state" = held ] && kill -CONT $1'
_PATIENCE: Final = 2.0  # seconds for all threads to stop; one may wait for a disk
_POLL: Final = 0.00005
_BECOME: Final = "run as root, or as the user that runs QEMU, on its host"


class Holder:
    """Holds a VM; a context manager that owns the guardian process.

    Args:
        qmp: a connection to the VM.
        check: called at the begin of every hold; raises if the VM must not be written to.

    Attributes:
        seconds: for how long the VM was held, in all.
        longest: the longest single hold, in seconds.
        count: how often.
        spans: begin and end of each hold, as time.perf_counter() has them.

    Raises:
        CheckFailed: the VM does not run, or its QEMU cannot be stopped from here.
    """

    def __init__(self, qmp: Monitor, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self.seconds = 0.0
        self.longest = 0.0
        self.count = 0
        self.spans: list[tuple[float, float]] = []
        self._pid = _running_qemu(qmp)
        self._tasks = f"/proc/{self._pid}/task"
        with ExitStack() as stack:
            self._pidfd = os.pidfd_open(self._pid)
            stack.callback(os.close, self._pidfd)
            self._signal(signal.SIGCONT)  # changes nothing, but shows that we may
            self._guardian = subprocess.Popen(
                ["/bin/sh", "-c", _GUARDIAN, "ovr-guardian", str(self._pid)],
                stdin=subprocess.PIPE,
                start_new_session=True,
                bufsize=0,
            )
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._guardian.stdin is not None
        self._guardian.stdin.close()
        self._guardian.wait()
        self._stack.close()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stop all vCPUs for the body of the ``with``; keep it short (tens of milliseconds).

        Raises:
            RestoreFailed: QEMU does not stop.
            VmUnreachable: QEMU has ended.
            OvrError: what the holder's `check` raises.
        """
        self._tell("held")
        start = time.perf_counter()
        self._signal(signal.SIGSTOP)
        try:
            self._await_stop(start + _PATIENCE)
            self._check()
            yield
        finally:
            self._signal(signal.SIGCONT)
            span = time.perf_counter() - start
            self._tell("running")
            self.seconds += span
            self.longest = max(self.longest, span)
            self.count += 1
            self.spans.append((start, start + span))

    def as_json(self) -> dict[str, float]:
        """Return what a report says about the holds."""
        return {"count": self.count, "seconds": self.seconds, "longest": self.longest}

    def _await_stop(self, deadline: float) -> None:
        # Stopped threads start no new ones: once all are seen stopped, they are.
        while not all(self._stopped(thread) for thread in os.listdir(self._tasks)):  # noqa: PTH208
            if time.perf_counter() > deadline:
                raise RestoreFailed(
                    f"QEMU {self._pid} does not stop within {_PATIENCE:g} s",
                    "is its host out of memory, or its disk stuck?",
                )
            # A thread stops when it runs: not while we have the CPU that it waits for.
            time.sleep(_POLL)

    def _stopped(self, thread: str) -> bool:
        # Asked for every thread in every hold, the guest waiting: pathlib takes twice as long.
        try:
            fd = os.open(f"{self._tasks}/{thread}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            return os.read(fd, 512).rpartition(b") ")[2][:1] in (b"T", b"t", b"Z", b"X")
        except ProcessLookupError:
            return True
        finally:
            os.close(fd)

    def _signal(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError as error:
            raise VmUnreachable(f"QEMU {self._pid} has ended") from error
        except PermissionError as error:
            raise CheckFailed(f"QEMU {self._pid} may not be signalled", _BECOME) from error

    def _tell(self, state: str) -> None:
        assert self._guardian.stdin is not None
        self._guardian.stdin.write(f"{state}\n".encode())


def _running_qemu(qmp: Monitor) -> int:
    status = qmp.status()
    if status != "running":
        raise CheckFailed(
            f"the VM is not running (QEMU says: {status})", "resume it first (QMP cont)"
        )
    if pid := qmp.qemu_pid:
        return pid
    raise CheckFailed("QEMU runs in a pid namespace that cannot be seen from here", _BECOME)
