"""Check that a process of the guest still has its address space."""

from typing import Final

from ovr.errors import AgentUntrusted, TaskDied
from ovr.guest.client.results import PoolInfo
from ovr.kernel import Kernel, Struct, find_task, find_vma, mm_space, types_that_fit
from ovr.kernel.linux.mm import VM_SHARED
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.paging import AddressSpace

__all__ = ["OF_THE_TASK", "Alive", "alive_with_pool"]

OF_THE_TASK: Final = "was it killed? look for the OOM killer in the guest's kernel log"


class Alive:
    """Checks that a process still has its address space.

    When it dies, its page tables are freed, and the next process may get them.

    Args:
        name: its name in messages.
        kernel: the guest's kernel.
        task: its leader.
        space: its address space.
    """

    def __init__(self, name: str, kernel: Kernel, task: Struct, space: AddressSpace) -> None:
        self.name = name
        self._kernel = kernel
        self._pid: int = task.pid
        self._task = task
        self.space = space

    @types_that_fit()
    def __call__(self) -> None:
        """Check it; to be called in a hold.

        Raises:
            TaskDied: the process has died.
        """
        task: Struct | None = find_task(self._kernel, self._pid)
        alive = task is not None and task == self._task and task.mm
        if not alive or mm_space(self._kernel, alive).root != self.space.root:
            raise TaskDied(f"{self.name} has died in the guest", OF_THE_TASK)


@types_that_fit()
def alive_with_pool(kernel: Kernel, pool: PoolInfo) -> Alive:
    """Return the process that has a pool, if its memory is private and anonymous.

    To be called in the hold in which the process was identified.

    Raises:
        AgentUntrusted: it is not.
        TaskDied: there is no such process any more.
        GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
    """
    name = "the process with the pool"
    task: Struct | None = find_task(kernel, pool.pid)
    if task is None or not task.mm:
        raise TaskDied(f"{name} has died in the guest", OF_THE_TASK)
    vma = find_vma(task.mm, pool.address)
    end = pool.address + pool.size
    wrong = not vma or vma.vm_end < end or vma.vm_flags & VM_SHARED or vma.vm_file
    if wrong or pool.address % PAGE_SIZE or pool.size % PAGE_SIZE:
        raise AgentUntrusted(
            f"pid {pool.pid} has no pool at {pool.address:#x}", "is this agent the guest's own?",
            "pool",
        )  # fmt: skip
    return Alive(name, kernel, task, mm_space(kernel, task.mm))
