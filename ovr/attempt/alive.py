"""Check that a process of the guest still has its address space."""

from typing import Final

from ovr.errors import TaskDied
from ovr.kernel import Kernel, Struct, find_task, mm_space, types_that_fit
from ovr.memory.paging import AddressSpace

__all__ = ["OF_THE_TASK", "Alive"]

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
