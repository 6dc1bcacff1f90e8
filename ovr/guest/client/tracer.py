"""Find the CRIU that holds the skeleton, and check in guest memory that the agent has started it.

It must be root of the guest and started by the agent. Otherwise another program could let the tree
run, or present another tree to ``ovr``.
"""

from typing import Any

from ovr.errors import AgentUntrusted
from ovr.guest.client.secret_page import AgentProcess
from ovr.kernel import Kernel, Struct, find_task, list_for_each_entry, types_that_fit, why_not_root
from ovr.memory.addresses import Gva

__all__ = ["find_tracer"]


@types_that_fit()
def find_tracer(kernel: Kernel, agent: AgentProcess, pid: int, *, engine: bool) -> Gva:
    """Return the ``struct task_struct`` of the CRIU that the agent names. To be called in a hold.

    Args:
        kernel: the guest's kernel.
        agent: the agent.
        pid: pid of CRIU, in the guest's initial pid namespace.
        engine: whether a container engine has started it: then the agent is not its parent, but its
            hook must be the agent's program.

    Raises:
        AgentUntrusted: it is not the agent's CRIU.
        GuestFault, KernelNotFound: invalid kernel objects in the guest.
    """
    task = find_task(kernel, pid)
    if task is None or task.tgid != task.pid:
        raise _untrusted(pid, "no such process")
    if reason := why_not_root(kernel, task):
        raise _untrusted(pid, reason)
    if engine and not any(_program(child) == agent.program for child in _children(task)):
        raise _untrusted(pid, "it does not run the agent's hook")
    if not engine and task.real_parent.address_ != agent.task:
        raise _untrusted(pid, "it was not started by the agent")
    return Gva(task.address_)


def _children(task: Struct) -> Any:
    return list_for_each_entry("struct task_struct", task.children, "sibling")


def _program(task: Struct) -> Gva:
    # A zombie has no mm, a kernel thread no program.
    file = task.mm.exe_file if task.mm else None
    return Gva(file.f_inode.address_) if file else Gva(0)


def _untrusted(pid: int, why: str) -> AgentUntrusted:
    return AgentUntrusted(
        f"the tree is held by pid {pid}, which is not the agent's CRIU: {why}",
        "does another program in the guest trace or restore processes? restore again",
        "tracer",
    )
