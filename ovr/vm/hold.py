"""Holding the VM for a bounded time, and releasing it whatever happens to ovr.

A hold puts all threads of QEMU into a ptrace stop, the vCPUs among them: no page table entry and no
`struct page` changes, so every check stays valid until the hold ends. The guest sees a moment
without CPU time, as from a busy host. No parent of QEMU is notified, no SIGCONT ends it, and its
terminal is not touched. Threads are seized anew for each hold; QEMU is not traced in between.

A separate process does it, the tracer (``native/tracer.c``), which resumes the VM when the last of
our threads has ended. If the tracer is killed, the kernel resumes the VM. The tracer breaks off a
hold that lasts too long, whatever delays ovr: it shuts the gate that all writes to guest RAM pass,
waits for writes in progress, and resumes the VM.

If QEMU may not be traced (Yama, or another security module), it is stopped by SIGSTOP. Then a hold
is valid only if no thread has run in it, and a QEMU whose terminal has a shell is refused.

QMP's ``stop`` would do too, but takes five times as long, notifies all management tools, and stops
and restarts the guest's vhost-user devices, over which vhost-device-vsock loses its queues (seen:
dead within 100 holds under traffic).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol, Self, TypeVar

from ovr._fastcopy import Hold
from ovr.errors import AttemptFailed, CheckFailed, HoldBroken, OvrError, VmUnreachable
from ovr.memory.ram import GuestRam
from ovr.vm.deferred import DeferredSignals
from ovr.vm.hold_errors import BECOME, Result, hold_error
from ovr.vm.qmp import Monitor

__all__ = ["BOUND_SECONDS", "BothHeld", "Holder", "Holds", "unbroken"]

BOUND_SECONDS: Final = 0.2
"""Seconds until a hold is broken off, once all threads stand. Copying ends at half of it."""

_PATIENCE: Final = 2.0  # seconds for all threads to stop; one may wait for a disk
_BROKEN_HOLDS: Final = 10
"""Holds in a row that may be broken off before work in them is given up."""

T = TypeVar("T")

_WAYS: Final[Mapping[int, str]] = {1: "ptrace", 2: "sigstop"}
"""``enum hold_way`` of native/hold.h."""


class Holder:
    """Holds a VM; a context manager that owns the tracer.

    Args:
        qmp: a connection to the VM.
        check: called at the beginning of every hold; raises if the VM must not be written to.
        ram: the VM's RAM, which from here on can be written only during holds.
        bound: seconds after which a hold is broken off.

    Attributes:
        seconds: total time of all holds.
        longest: the longest hold, in seconds.
        count: the number of holds.
        spans: begin and end of each hold, in time of time.perf_counter().

    Raises:
        CheckFailed: the VM does not run, or its QEMU cannot be held from here.
        AttemptFailed: QEMU does not stop.
        VmUnreachable: QEMU has ended.
    """

    def __init__(
        self,
        qmp: Monitor,
        check: Callable[[], None] = lambda: None,
        *,
        ram: GuestRam | None = None,
        bound: float | None = None,
    ) -> None:
        self._check = check
        self._ram = ram
        self._bound = BOUND_SECONDS if bound is None else bound
        self.seconds = 0.0
        self.longest = 0.0
        self.count = 0
        self.spans: list[tuple[float, float]] = []
        self._pid = _running_qemu(qmp)
        self._signals = DeferredSignals()
        self._native: Hold | None = None
        with self._signals:
            self._try_out()

    def __enter__(self) -> Self:
        self._signals.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._close()
        finally:
            self._signals.__exit__()

    @property
    def tracer(self) -> int:
        """The tracer's pid; 0 if it was killed."""
        return self._native.tracer if self._native else 0

    @property
    def way(self) -> str:
        """The way in which the VM is held: ``ptrace`` or ``sigstop``."""
        return _WAYS.get(self._native.way, "") if self._native else ""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stop all vCPUs for the body of the ``with``; keep it short (tens of milliseconds).

        Signals to ovr are handled at its end: ``KeyboardInterrupt`` does not leave it.

        Raises:
            HoldBroken: the VM ran before the end of the body, or may have: nothing found or
                written in it is valid.
            AttemptFailed: QEMU does not stop.
            CheckFailed: QEMU may not be held: a debugger traces it.
            VmUnreachable: QEMU has ended.
            OvrError: the errors of `check`.
        """
        self._signals.begin()
        try:
            start = time.perf_counter()
            native = self._take()
            try:
                self._check()
                yield
            finally:
                result = native.let_go()
                self._count(start)
                if result:
                    raise self._error(result, native)
        finally:
            self._signals.end()

    def as_json(self) -> dict[str, float | str]:
        """Return the section of a report about the holds."""
        return {
            "by": self.way, "count": self.count, "seconds": self.seconds, "longest": self.longest
        }  # fmt: skip

    def _try_out(self) -> None:
        # Fail now if it cannot be held, before anything is built in the guest.
        self._signals.begin()
        try:
            native = self._take()
            if result := native.let_go():
                raise self._error(result, native)
        except OvrError:
            self._close()
            raise

    def _take(self) -> Hold:
        native = self._native
        if native is None or not native.tracer:
            # The first tracer, or a new one for a killed one: writes may have to be undone.
            native = self._native = self._start()
        result = native.take()
        if result == Result.LOST:
            # It was killed a moment ago, outside of a hold.
            native = self._native = self._start()
            result = native.take()
        if result:
            raise self._error(result, native)
        return native

    def _start(self) -> Hold:
        try:
            native = Hold(self._pid, bound=self._bound, patience=_PATIENCE)
        except (ProcessLookupError, FileNotFoundError) as error:
            raise VmUnreachable(f"QEMU {self._pid} has ended") from error
        except OSError as error:
            raise AttemptFailed(
                f"no process can be made that holds the VM: {error.strerror}",
                "is the host out of memory, or of processes?",
            ) from error
        if self._ram is not None:
            self._ram.govern(native)
        return native

    def _close(self) -> None:
        if self._native is not None:
            self._native.close()

    def _count(self, start: float) -> None:
        span = time.perf_counter() - start
        self.seconds += span
        self.longest = max(self.longest, span)
        self.count += 1
        self.spans.append((start, start + span))

    def _error(self, result: int, native: Hold) -> OvrError:
        return hold_error(result, self._pid, native.who, bound=self._bound, patience=_PATIENCE)


class Holds(Protocol):
    """Holds one VM, or more."""

    def held(self) -> AbstractContextManager[None]:
        """As `Holder.held`."""


class BothHeld:
    """Holds two VMs.

    Args:
        one: holds the VM that is held first, and longer.
        other: holds the other one.
    """

    def __init__(self, one: Holds, other: Holds) -> None:
        self._one = one
        self._other = other

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold both for the body of the ``with``.

        Raises:
            HoldBroken: one of them ran before the end of the body, or may have.
            OvrError: as `Holder.held`.
        """
        during_a_write = False
        try:
            with self._one.held():
                try:
                    with self._other.held():
                        yield
                except HoldBroken as error:
                    during_a_write = not error.after_writes
                    raise
        except HoldBroken as error:
            # If both were broken, this one hides the first: the hold is only as good as the worse.
            error.after_writes &= not during_a_write
            raise


def unbroken(holder: Holds, work: Callable[[], T], *, writes: bool = False) -> T:
    """Do work in a hold, once more if the hold is broken off; return what the last one returns.

    Args:
        holder: holds the VM.
        work: what is done; it forgets what an earlier call of it has found.
        writes: it writes to guest RAM, and may do so again. A hold in which the VM may have run
            during a write is never repeated: the write may have met another page, and an error has
            to say so.

    Raises:
        HoldBroken: holds are broken off again and again, or one must not be repeated.
        OvrError: as `Holder.held`, or as `work`.
    """
    for _ in range(_BROKEN_HOLDS):
        try:
            with holder.held():
                return work()
        except HoldBroken as error:
            if writes and not error.after_writes:
                raise
    with holder.held():
        return work()


def _running_qemu(qmp: Monitor) -> int:
    status = qmp.status()
    if status != "running":
        raise CheckFailed(
            f"the VM is not running (QEMU says: {status})", "resume it first (QMP cont)"
        )
    if pid := qmp.qemu_pid:
        return pid
    raise CheckFailed("QEMU runs in a pid namespace that cannot be seen from here", BECOME)
