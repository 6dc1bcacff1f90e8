"""Write the state of open files and their descriptors."""

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
        """Return True if exec closes it, else None: CRIU opens files without the flag."""
        return True if image.flags & _FD_CLOEXEC else None

    def neutralise(self, image: FdinfoEntry) -> None:
        """Clear the flag."""
        image.flags &= ~_FD_CLOEXEC

    def write(self, target: Descriptor, value: bool) -> None:
        """Set the bit as __set_close_on_exec() does under the table's lock."""
        # SAFETY: only tasks of the tree have this table, all of them stopped: CRIU gives its
        # children their own tables. Undone by killing the tree.
        set_close_on_exec(*target, value)

    def read(self, target: Descriptor) -> bool:
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
        """Set position 0."""
        image.reg.pos = 0

    def write(self, target: Any, value: int) -> None:
        """Store as vfs_setpos() does."""
        # SAFETY: CRIU has opened the file for this tree: only tasks of the tree have it, all of
        # them stopped, so f_pos_lock is free. For a regular file the position is one plain word
        # from which nothing is derived. Undone by killing the tree.
        target.f_pos = value

    def read(self, target: Any) -> int:
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
        """Set 0."""
        image.efd.counter = 0

    def write(self, target: Any, value: int) -> None:
        """Store as eventfd_write() does, without waking up waiters."""
        # SAFETY: only tasks of the tree have the file, all of them stopped. Waiters restart their
        # system call when they run, and read the counter then. An epoll instance would need a
        # wake-up; the scope leaves eventfds inside if there is one. Undone by killing the tree.
        target.count = value

    def read(self, target: Any) -> int:
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
        """Set an empty mask."""
        image.sgfd.sigmask = 0

    def write(self, target: Any, value: int) -> None:
        """Store the inverted mask, as do_signalfd4() does."""
        # SAFETY: as for an eventfd. The kernel changes the mask by one store of one word, under the
        # reading task's siglock. Undone by killing the tree.
        target.sigmask.sig[0] = ~value & _ALL_SIGNALS

    def read(self, target: Any) -> int:
        return ~int(target.sigmask.sig[0]) & _ALL_SIGNALS


class TimerfdTicks(Kind):
    """The number of expirations that read() of a timerfd returns."""

    name = "timerfd_ticks"
    groups = ("files",)
    summary = "expirations of timerfds not read yet (timerfd_ctx.ticks); not where epoll is used"
    source = "TFD_IOC_SET_TICKS in criu/pie/restorer.c; timerfd_ioctl()"
    scope = TIMERFD

    def take(self, image: FileEntry) -> int | None:
        """Return the number of expirations; None for an armed timer, which increments it."""
        timer = image.tfd
        return None if timer.vsec or timer.vnsec else timer.ticks

    def neutralise(self, image: FileEntry) -> None:
        """Set 0."""
        image.tfd.ticks = 0

    def write(self, target: Any, value: int) -> None:
        """Store as timerfd_ioctl() does, without waking up waiters."""
        # SAFETY: as for an eventfd; no timer interrupt writes the word, because the timer is not
        # armed. Undone by killing the tree.
        target.ticks = value

    def read(self, target: Any) -> int:
        return int(target.ticks)


KINDS: Final = (
    CloseOnExec(),
    FilePosition(),
    EventfdCounter(),
    SignalfdMask(),
    TimerfdTicks(),
)
