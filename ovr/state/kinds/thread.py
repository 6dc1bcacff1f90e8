"""Write per-thread state: the name, and the words that the kernel uses when the thread exits."""

from typing import Any, Final

from ovr.images import CoreEntry
from ovr.kernel import NoSuchMember
from ovr.state.kind import Kind
from ovr.state.scope import THREAD

__all__ = ["KINDS", "ClearChildTid", "Comm", "RobustList"]

_COMM_LENGTH: Final = 15  # TASK_COMM_LEN without the NUL
_HEAD_SIZE: Final = 24  # sizeof(struct robust_list_head), the only one that set_robust_list() takes


class Comm(Kind):
    """PR_SET_NAME."""

    name = "comm"
    groups = ("thread",)
    summary = "name (task_struct.comm)"
    source = "PR_SET_NAME in criu/pie/restorer.c; __set_task_comm()"
    scope = THREAD

    def take(self, image: CoreEntry) -> str | None:
        """Return the name; bytes that are not UTF-8 become surrogates."""
        if image.HasField("tc"):
            comm = image.tc.comm
        elif image.thread_core.HasField("comm"):
            comm = image.thread_core.comm
        else:
            return None
        return comm.partition(b"\0")[0][:_COMM_LENGTH].decode(errors="surrogateescape")

    def neutralise(self, image: CoreEntry) -> None:
        """Set ``ovr-neutral``."""
        if image.HasField("tc"):
            image.tc.comm = b"ovr-neutral"
        if image.thread_core.HasField("comm"):
            image.thread_core.comm = b"ovr-neutral"

    def write(self, target: Any, value: str) -> None:
        """Store the whole array, padded with zeros, as __set_task_comm() does."""
        # SAFETY: the field is the thread's own; readers in the kernel take no lock and tolerate
        # concurrent changes; the last byte stays NUL. Undone by killing the tree.
        target.comm = value

    def read(self, target: Any) -> str:
        return str(target.comm)


class RobustList(Kind):
    """set_robust_list(2)."""

    name = "robust_list"
    groups = ("thread",)
    summary = "list of robust futexes (task_struct.robust_list)"
    source = "restore_robust_futex() in criu/pie/restorer.c; sys_set_robust_list()"
    scope = THREAD

    def take(self, image: CoreEntry) -> int | None:
        """Return the GVA of its head; None for a 32-bit list."""
        core = image.thread_core
        return core.futex_rla if core.futex_rla_len == _HEAD_SIZE else None

    def neutralise(self, image: CoreEntry) -> None:
        """Remove the list."""
        image.thread_core.futex_rla = image.thread_core.futex_rla_len = 0

    def write(self, target: Any, value: int) -> None:
        """Store as sys_set_robust_list() does."""
        # SAFETY: one store into a field that only the thread itself uses, when it exits; the kernel
        # reads any address in it as user memory. Undone by killing the tree.
        _futex_data(target).robust_list = value

    def read(self, target: Any) -> int:
        return int(_futex_data(target).robust_list.address_)


def _futex_data(thread: Any) -> Any:
    try:
        # struct futex_sched_data, include/linux/futex_types.h: since some kernel after v6.18
        return thread.futex
    except NoSuchMember:
        return thread


class ClearChildTid(Kind):
    """set_tid_address(2)."""

    name = "clear_child_tid"
    groups = ("thread",)
    summary = "word to clear at exit (task_struct.clear_child_tid); pthread_join waits for it"
    source = "set_tid_address in criu/pie/restorer.c; sys_set_tid_address()"
    scope = THREAD

    def take(self, image: CoreEntry) -> int:
        """Return the GVA of the word."""
        return image.thread_info.clear_tid_addr

    def neutralise(self, image: CoreEntry) -> None:
        """Set no address."""
        image.thread_info.clear_tid_addr = 0

    def write(self, target: Any, value: int) -> None:
        """Store as sys_set_tid_address() does."""
        # SAFETY: one store into a field that only the thread itself uses, when it exits; the kernel
        # writes to any address in it as user memory. Undone by killing the tree.
        target.clear_child_tid = value

    def read(self, target: Any) -> int:
        return int(target.clear_child_tid)


KINDS: Final = (Comm(), RobustList(), ClearChildTid())
