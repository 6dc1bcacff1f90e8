"""Control groups: the group of a task, its path, and its controllers' own structures.

Source: include/linux/cgroup.h, include/linux/cgroup-defs.h, kernel/cgroup/cgroup.c.
"""

from typing import Any, Final

from ovr.errors import GuestFault
from ovr.kernel.types.view import NoSuchMember, Struct, container_of

__all__ = ["cgroup_path", "mem_cgroup", "pids_cgroup", "task_css", "task_dfl_cgroup"]

MAX_DEPTH: Final = 256
NAME_MAX: Final = 255


def task_css(task: Struct, controller: str) -> Any:
    """Return the state that a controller keeps for a task's group (``task_css()``).

    Args:
        task: any task.
        controller: its name in the kernel: ``memory``, ``pids``, ``cpu``.

    Returns:
        The ``struct cgroup_subsys_state``; groups that do not have the controller share their
        parent's.

    Raises:
        NoSuchMember: the kernel has no such controller.
    """
    numbers = task.types_.enum("enum cgroup_subsys_id")
    try:
        return task.cgroups.subsys[numbers[f"{controller}_cgrp_id"]]
    except KeyError:
        raise NoSuchMember(f"the guest's kernel has no cgroup controller {controller}") from None


def mem_cgroup(task: Struct) -> Any:
    """Return the ``struct mem_cgroup`` that a task is charged to (``mem_cgroup_from_task()``)."""
    return container_of(task_css(task, "memory"), "struct mem_cgroup", "css")


def pids_cgroup(task: Struct) -> Any:
    """Return the ``struct pids_cgroup`` that a task is counted in (``pids_css()``)."""
    return container_of(task_css(task, "pids"), "struct pids_cgroup", "css")


def task_dfl_cgroup(task: Struct) -> Any:
    """Return a task's ``struct cgroup`` in the unified hierarchy (``task_dfl_cgroup()``)."""
    return task.cgroups.dfl_cgrp


def cgroup_path(cgroup: Struct) -> str:
    """Return where a ``struct cgroup`` is in its hierarchy: ``/`` or ``/system.slice/…``.

    Raises:
        GuestFault: the names lead to no root.
    """
    names: list[str] = []
    node = cgroup.kn
    while parent := _parent(node):
        if len(names) >= MAX_DEPTH:
            raise GuestFault(f"a cgroup has no root: at {node.address_:#x}", node.address_)
        names.append(node.name.string_(NAME_MAX + 1).decode(errors="surrogateescape"))
        node = parent
    return "/" + "/".join(reversed(names))


def _parent(node: Struct) -> Any:
    try:
        # Linux kernel commit 633488947ef6 ("kernfs: Use RCU to access kernfs_node::parent")
        # (in v6.15)
        return node.__parent
    except NoSuchMember:
        return node.parent
