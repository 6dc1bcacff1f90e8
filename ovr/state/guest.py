"""Find the skeleton's kernel objects in the guest by the ids in the images."""

from typing import Any

from ovr.errors import AgentUntrusted, AttemptFailed
from ovr.kernel import Kernel, Struct, find_task, is_traced
from ovr.kernel.linux.fdtable import files_lookup_fd
from ovr.memory.addresses import Gva

__all__ = ["GuestTree"]


class GuestTree:
    """The kernel objects of a held tree. Results are valid only while the VM is held.

    Args:
        kernel: the guest's kernel.
        root: the ``task_struct`` of the tree's root; pids are those of its pid namespace.
        tracer: the ``task_struct`` of the CRIU that traces the tree.
    """

    def __init__(self, kernel: Kernel, root: Struct, tracer: Gva) -> None:
        self.kernel = kernel
        self._root = root
        self._tracer = tracer
        self._tasks: dict[int, Any] = {}

    def task(self, tid: int) -> Any:
        """Return the ``task_struct`` of a thread that CRIU has stopped.

        Raises:
            AttemptFailed: there is none, or it is not stopped.
            AgentUntrusted: another process than the agent's CRIU traces it.
        """
        if tid not in self._tasks:
            task = find_task(self.kernel, tid, namespace_of=self._root)
            if not (task and is_traced(task)):
                raise AttemptFailed(
                    f"thread {tid} of the held tree is gone, or not stopped",
                    "was it killed? look for the OOM killer in the guest's kernel log",
                )
            # ptrace_link(): a tracee's parent is its tracer.
            if not task.ptrace or task.parent.address_ != self._tracer:
                raise AgentUntrusted(
                    f"thread {tid} of the held tree is not traced by the agent's CRIU",
                    "does another program in the guest trace processes? restore again",
                    "tracer",
                )
            self._tasks[tid] = task
        return self._tasks[tid]

    def file(self, pid: int, fd: int, operations: str = "") -> Any:
        """Return the ``struct file`` behind a descriptor.

        Args:
            pid: pid of a task that has it open.
            fd: the descriptor.
            operations: the symbol that its ``f_op`` must point to; empty for any.

        Raises:
            AttemptFailed: it is not open, or another kind of file.
        """
        file = files_lookup_fd(self.task(pid).files, fd)
        if not file or (operations and file.f_op.address_ != self.kernel.symbol(operations)):
            raise AttemptFailed(
                f"fd {fd} of pid {pid} is not open, or another kind of file than in the images",
                "report it, with the images",
            )
        return file
