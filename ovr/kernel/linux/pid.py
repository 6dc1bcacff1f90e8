"""Process numbers: ``struct pid`` and its number in each pid namespace.

Source: kernel/pid.c, include/linux/pid.h.
"""

from typing import Any

from ovr.kernel.linux.xarray import idr_find
from ovr.kernel.types.view import Struct, container_of
from ovr.memory.addresses import Gva

__all__ = [
    "find_pid_ns",
    "find_task_by_pid_ns",
    "ns_of_pid",
    "pid_nr_ns",
    "pid_task",
    "task_active_pid_ns",
]


def find_pid_ns(number: int, ns: Struct) -> Any:
    """Return the ``struct pid`` that has a number in a ``struct pid_namespace``, or NULL."""
    return ns.types_.pointer("struct pid", ns.space_, idr_find(ns.idr, number))


def pid_task(pid: Struct, kind: str = "PIDTYPE_PID") -> Any:
    """Return the task of a ``struct pid``, or NULL (``pid_task()``)."""
    number = pid.types_.enum("enum pid_type")[kind]
    node = pid.tasks[number].first if pid else None
    if not node:
        return pid.types_.pointer("struct task_struct", pid.space_, Gva(0))
    return container_of(node, "struct task_struct", f"pid_links[{number}]")


def pid_nr_ns(pid: Struct, ns: Struct) -> int:
    """Return the number of a ``struct pid`` in a pid namespace, or 0 (``pid_nr_ns()``)."""
    level: int = ns.level
    if pid and level <= pid.level:
        upid = pid.numbers.resized(pid.level + 1)[level]
        if upid.ns == ns:
            return int(upid.nr)
    return 0


def find_task_by_pid_ns(number: int, ns: Struct) -> Any:
    """Return the task (thread) that has a number in a ``struct pid_namespace``, or NULL."""
    return pid_task(find_pid_ns(number, ns))


def ns_of_pid(pid: Struct) -> Any:
    """Return the ``struct pid_namespace`` of a ``struct pid`` (``ns_of_pid()``)."""
    return pid.numbers.resized(pid.level + 1)[pid.level].ns


def task_active_pid_ns(task: Struct) -> Any:
    """Return the pid namespace of a task (``task_active_pid_ns()``)."""
    return ns_of_pid(task.thread_pid)
