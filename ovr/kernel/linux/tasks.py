"""Tasks: their list, and their fields in /proc.

Source: include/linux/sched/signal.h, fs/proc/array.c, include/linux/sched.h.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from ovr.errors import GuestFault
from ovr.kernel.kernel import Kernel
from ovr.kernel.linux.list import list_for_each_entry
from ovr.kernel.linux.pid import find_task_by_pid_ns, pid_nr_ns, task_active_pid_ns
from ovr.kernel.types.live import settled
from ovr.kernel.types.view import NoSuchMember, Struct

__all__ = [
    "Process",
    "find_task",
    "for_each_process",
    "for_each_thread",
    "is_kernel_thread",
    "is_traced",
    "processes",
    "task_comm",
    "task_state",
    "tree_of",
]

PF_WQ_WORKER: Final = 0x20
PF_KTHREAD: Final = 0x0020_0000

TASK_UNINTERRUPTIBLE: Final = 0x02
TASK_TRACED: Final = 0x08
EXIT_ZOMBIE: Final = 0x20
TASK_REPORT: Final = 0x7F
TASK_REPORT_IDLE: Final = 0x80
TASK_IDLE: Final = 0x402  # TASK_UNINTERRUPTIBLE | TASK_NOLOAD
TASK_RTLOCK_WAIT: Final = 0x1000
TASK_FROZEN: Final = 0x8000
STATE_LETTERS: Final = "RSDTtXZPI"

COMM_SIZE: Final = 64
MAX_TASKS: Final = 1 << 22
"""PID_MAX_LIMIT: include/linux/threads.h."""


@dataclass(frozen=True)
class Process:
    """A process, as ``ps`` shows it.

    Attributes:
        pid: its number in the initial pid namespace.
        ppid: that of its parent, 0 if it has none.
        comm: its name, as in ``/proc/PID/comm``.
        state: the letter in ``/proc/PID/stat``.
        tids: the numbers of its threads, itself included.
        kernel: whether it is a kernel thread.
    """

    pid: int
    ppid: int
    comm: str
    state: str
    tids: tuple[int, ...]
    kernel: bool

    @property
    def threads(self) -> int:
        """The number of its threads."""
        return len(self.tids)


def for_each_process(kernel: Kernel) -> Iterator[Any]:
    """Yield the leader of every process but the idle one (``for_each_process()``)."""
    yield from list_for_each_entry("struct task_struct", kernel["init_task"].tasks, "tasks")


def for_each_thread(task: Struct) -> Iterator[Any]:
    """Yield every thread of a process, itself included (``for_each_thread()``)."""
    head = task.signal.thread_head
    yield from list_for_each_entry("struct task_struct", head, "thread_node")


def find_task(kernel: Kernel, pid: int, namespace_of: Struct | None = None) -> Any:
    """Return the task (thread) with a pid, or None.

    Args:
        kernel: the guest's kernel.
        pid: its number in a pid namespace.
        namespace_of: a task that runs in that namespace; None means the initial one.
    """

    def find() -> Any:
        ns = task_active_pid_ns(namespace_of) if namespace_of else kernel["init_pid_ns"]
        return find_task_by_pid_ns(pid, ns) or None

    return settled(find)


def processes(kernel: Kernel) -> list[Process]:
    """Return all processes, by pid.

    Raises:
        GuestFault: the task list is invalid each time it is read.
    """
    found = settled(lambda: _described(for_each_process(kernel)))
    return sorted(found, key=lambda process: process.pid)


def tree_of(kernel: Kernel, root_pid: int) -> list[tuple[int, Struct]]:
    """Return a process and its descendants, each with its pid in the pid namespace of the process.

    Args:
        kernel: the guest's kernel.
        root_pid: the process, by its pid in the initial pid namespace.

    Raises:
        GuestFault: the task list is invalid each time it is read.
    """

    def find() -> list[tuple[int, Struct]]:
        tasks = {task.tgid: task for task in for_each_process(kernel)}
        if root_pid not in tasks:
            return []
        ns = task_active_pid_ns(tasks[root_pid])
        children: dict[int, list[int]] = {}
        for tgid, task in tasks.items():
            children.setdefault(task.real_parent.tgid, []).append(tgid)
        members, found = [root_pid], []
        while members:
            pid = members.pop()
            found.append((pid_nr_ns(tasks[pid].thread_pid, ns), tasks[pid]))
            members += children.pop(pid, ())
        return found

    return settled(find)


def _described(leaders: Iterator[Struct]) -> list[Process]:
    # Bounds all lists together, not only each of them.
    found, threads = [], 0
    for task in leaders:
        found.append(_describe(task))
        threads += len(found[-1].tids)
        if threads > MAX_TASKS:
            raise GuestFault("the guest lists more threads than there can be", task.address_)
    return found


def _describe(task: Struct) -> Process:
    return Process(
        pid=task.tgid,
        ppid=task.real_parent.tgid,
        comm=task_comm(task),
        state=task_state(task),
        tids=tuple(thread.pid for thread in for_each_thread(task)),
        kernel=is_kernel_thread(task),
    )


def is_kernel_thread(task: Struct) -> bool:
    """Tell whether a task is a kernel thread (``PF_KTHREAD``)."""
    return bool(task.flags & PF_KTHREAD)


def is_traced(task: Struct) -> bool:
    """Tell whether a tracer holds a task stopped."""
    return bool(task.__state & TASK_TRACED)


def task_state(task: Struct) -> str:
    """Return the letter in ``/proc/PID/stat`` (``task_state_index()``)."""
    state = task.__state
    reported = (state | task.exit_state) & TASK_REPORT
    if state & TASK_IDLE == TASK_IDLE:
        reported = TASK_REPORT_IDLE
    if state & (TASK_RTLOCK_WAIT | TASK_FROZEN):
        reported = TASK_UNINTERRUPTIBLE
    return STATE_LETTERS[reported.bit_length()]


def task_comm(task: Struct) -> str:
    """Return the name in ``/proc/PID/comm`` (``proc_task_name()``).

    Names of kernel threads may be longer than ``task->comm``.
    """
    comm: str = task.comm
    if is_kernel_thread(task):
        kthread = _to_kthread(task)
        if task.flags & PF_WQ_WORKER:
            comm = _worker_comm(comm, kthread)
        elif kthread.full_name:
            comm = _full_name(kthread)
    return comm[: COMM_SIZE - 1]


def _to_kthread(task: Struct) -> Any:
    try:
        # Linux kernel commit e32cf5dfbe22 ("kthread: Generalize pf_io_worker so it can point to
        # struct kthread") (in v5.17)
        return task.worker_private.cast_("struct kthread")
    except NoSuchMember:
        return task.set_child_tid.cast_("struct kthread")


def _worker_comm(comm: str, kthread: Struct) -> str:
    # wq_worker_comm(). Linux kernel commit 2a1b02bcba78 ("workqueue: Refactor worker ID formatting
    # and make wq_worker_comm() use full ID string") (in v6.11): before it, rescuers
    # are kworkers too, with names that fit into task->comm.
    if comm.startswith("kworker/") and kthread.full_name:
        comm = _full_name(kthread)
    worker = kthread.data.cast_("struct worker")
    if worker.pool and worker.desc:
        comm += ("+" if worker.current_work else "-") + worker.desc
    return comm


def _full_name(kthread: Struct) -> str:
    name: bytes = kthread.full_name.string_(COMM_SIZE)
    return name.decode(errors="surrogateescape")
