"""Open files and their descriptors."""

from typing import Any, Final

from ovr.images.objects import FdinfoEntry, FileEntry
from ovr.kernel.linux.fdtable import close_on_exec, set_close_on_exec
from ovr.state.kind import Kind
from ovr.state.scope import DESCRIPTOR, EVENTFD, REGULAR_FILE, SIGNALFD, TIMERFD, Descriptor

__all__ = [
    "KINDS",
    "CloseOnExec",
    "EventfdCounter",
    "FilePosition",
    "SignalfdMask",
    "TimerfdTicks",
]

_FD_CLOEXEC: Final = 1
_NO_POSITION: Final = (1 << 64) - 1
_NEVER_BLOCKED: Final = 1 << 8 | 1 << 18  # SIGKILL and SIGSTOP
_ALL_SIGNALS: Final = (1 << 64) - 1


class CloseOnExec(Kind):
    """FD_CLOEXEC."""

    name = "close_on_exec"
    groups = ("files",)
    summary = "descriptors that exec closes (fdtable.close_on_exec)"
    source = "F_SETFD in criu/files.c; __set_close_on_exec()"
    scope = DESCRIPTOR

    def take(self, image: FdinfoEntry) -> bool | None:
        """Return True if exec closes it; if not, it is as CRIU opens it."""
        return True if image.flags & _FD_CLOEXEC else None

    def neutralise(self, image: FdinfoEntry) -> None:
        """Not."""
        image.flags &= ~_FD_CLOEXEC

    def write(self, target: Descriptor, value: bool) -> None:
        """As __set_close_on_exec() does under the table's lock."""
        # SAFETY: only tasks of the tree have this table, all of them stopped: CRIU gives its
        # children tables of their own. Undone by killing the tree.
        set_close_on_exec(*target, value)

    def read(self, target: Descriptor) -> bool:
        """Read it."""
        return close_on_exec(*target)


class FilePosition(Kind):
    """lseek(2), for regular files."""

    name = "file_position"
    groups = ("files",)
    summary = "positions of regular files (file.f_pos)"
    source = "lseek in criu/files-reg.c; vfs_setpos()"
    scope = REGULAR_FILE

    def take(self, image: FileEntry) -> int | None:
        """Return the position in bytes."""
        return image.reg.pos if image.reg.pos != _NO_POSITION else None

    def neutralise(self, image: FileEntry) -> None:
        """The start."""
        image.reg.pos = 0

    def write(self, target: Any, value: int) -> None:
        """As vfs_setpos() does."""
        # SAFETY: CRIU has opened the file for this tree: only tasks of the tree have it, all of
        # them stopped, so nobody holds f_pos_lock. For a regular file the position is one plain
        # word from which nothing is derived. Undone by killing the tree.
        target.f_pos = value

    def read(self, target: Any) -> int:
        """Read it."""
        return int(target.f_pos)


class EventfdCounter(Kind):
    """eventfd(2)."""

    name = "eventfd_counter"
    groups = ("files",)
    summary = "counters of eventfds (eventfd_ctx.count); not where epoll is used"
    source = "eventfd_open() in criu/eventfd.c; eventfd_write()"
    scope = EVENTFD

    def take(self, image: FileEntry) -> int:
        """Return the counter."""
        return image.efd.counter

    def neutralise(self, image: FileEntry) -> None:
        """Zero."""
        image.efd.counter = 0

    def write(self, target: Any, value: int) -> None:
        """As eventfd_write() does, but for waking up those who wait."""
        # SAFETY: only tasks of the tree have the file. They are stopped: those that wait for it
        # begin their system call anew when they run, and look at the counter then. An epoll
        # instance would have to be told, and the scope leaves eventfds inside if there is one.
        # Undone by killing the tree.
        target.count = value

    def read(self, target: Any) -> int:
        """Read it."""
        return int(target.count)


class SignalfdMask(Kind):
    """signalfd(2)."""

    name = "signalfd_mask"
    groups = ("files", "signals")
    summary = "masks of signalfds (signalfd_ctx.sigmask); not where epoll is used"
    source = "signalfd_open() in criu/signalfd.c; do_signalfd4()"
    scope = SIGNALFD

    def take(self, image: FileEntry) -> int:
        """Return the mask: bit N-1 for signal N."""
        return image.sgfd.sigmask & ~_NEVER_BLOCKED

    def neutralise(self, image: FileEntry) -> None:
        """No signals."""
        image.sgfd.sigmask = 0

    def write(self, target: Any, value: int) -> None:
        """As do_signalfd4() does, which keeps the mask inverted."""
        # SAFETY: as for an eventfd. The kernel changes the mask under the lock of the task that
        # reads, one word by one store. Undone by killing the tree.
        target.sigmask.sig[0] = ~value & _ALL_SIGNALS

    def read(self, target: Any) -> int:
        """Read it."""
        return ~int(target.sigmask.sig[0]) & _ALL_SIGNALS


class TimerfdTicks(Kind):
    """What read() of a timerfd returns."""

    name = "timerfd_ticks"
    groups = ("files",)
    summary = "expirations of timerfds not read yet (timerfd_ctx.ticks); not where epoll is used"
    source = "TFD_IOC_SET_TICKS in criu/pie/restorer.c; timerfd_ioctl()"
    scope = TIMERFD

    def take(self, image: FileEntry) -> int | None:
        """Return the number of expirations; None while the timer runs, for it adds to them."""
        timer = image.tfd
        return None if timer.vsec or timer.vnsec else timer.ticks

    def neutralise(self, image: FileEntry) -> None:
        """None."""
        image.tfd.ticks = 0

    def write(self, target: Any, value: int) -> None:
        """As timerfd_ioctl() does, but for waking up those who wait."""
        # SAFETY: as for an eventfd; no timer interrupt writes the word, for the timer is not
        # armed. Undone by killing the tree.
        target.ticks = value

    def read(self, target: Any) -> int:
        """Read it."""
        return int(target.ticks)


KINDS: Final = (
    CloseOnExec(),
    FilePosition(),
    EventfdCounter(),
    SignalfdMask(),
    TimerfdTicks(),
)
