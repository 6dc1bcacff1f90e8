"""What a kind of state is: the interface that every module of this room implements."""

from dataclasses import dataclass
from typing import Any, Protocol, Self

from ovr.images import CoreEntry, FsEntry, InsideImages, MmEntry, Task, copy_of

__all__ = ["InsideTask", "Kind"]


@dataclass
class InsideTask:
    """A task's images as they will be inside: copies, to be changed in place."""

    pid: int
    cores: dict[int, CoreEntry]
    mm: MmEntry
    fs: FsEntry | None

    @classmethod
    def of(cls, task: Task) -> Self:
        """Copy the images of a task that is alive."""
        assert task.mm is not None
        return cls(
            task.pid,
            {tid: copy_of(core) for tid, core in task.cores.items()},
            copy_of(task.mm),
            None if task.fs is None else copy_of(task.fs),
        )

    def put(self, inside: InsideImages, original: Task) -> None:
        """Hand in what has changed; what has not is passed on byte for byte."""
        for tid, core in self.cores.items():
            if core != original.cores[tid]:
                inside.replace(f"core-{tid}.img", core)
        if self.mm != original.mm:
            inside.replace(f"mm-{self.pid}.img", self.mm)
        if self.fs is not None and self.fs != original.fs:
            inside.replace(f"fs-{self.pid}.img", self.fs)


class Kind(Protocol):
    """A kind of state of one task, written from outside through the kernel view."""

    @property
    def name(self) -> str:
        """What ``--outside`` calls it."""

    @property
    def summary(self) -> str:
        """What it is, in one line, with the kernel's name for it."""

    def take(self, task: Task) -> Any:
        """Return the value to write outside, or None if the images carry none."""

    def neutralise(self, inside: InsideTask) -> None:
        """Leave the neutral value in the inside images."""

    def write(self, task: Any, value: Any) -> None:
        """Write the value into the ``task_struct`` that the kernel view shows as `task`."""

    def read(self, task: Any) -> Any:
        """Return what `write` wrote, as the guest has it now."""
