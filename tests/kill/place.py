"""A VM in which victims of a restore or dump are killed, booted when there is none."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from ovr import lab
from tests import subject
from tests.kill.attempt import Event, Point, Story, events_of

__all__ = ["Place"]


class Place(ABC):
    """A VM, and the events of one restore or dump in it.

    Args:
        boot: boots a VM.
        scratch: a directory for this run.

    Attributes:
        story: restore or dump.
        events: of one that nothing happens to.
        temporary: where it has its temporary files.
    """

    story: ClassVar[Story]

    def __init__(self, boot: Callable[[], lab.LabVm], scratch: Path) -> None:
        self._boot = boot
        self.temporary = scratch / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self._vm: lab.LabVm | None = None
        self.events: list[Event] = []

    @property
    def vm(self) -> lab.LabVm:
        """A VM that runs."""
        if self._vm is None or not self._vm.alive:
            self.down()
            self._vm = self._boot()
            subject.install(self._vm)
            for _ in range(0 if self.events else 2):  # the first is slow
                self.events = events_of(self.command(self._vm), self.temporary)
        return self._vm

    def down(self) -> None:
        """End the VM."""
        if self._vm is not None:
            self._vm.down()
            self._vm = None

    @abstractmethod
    def command(self, vm: lab.LabVm) -> list[str]:
        """Make the VM ready for one restore or dump, and return its command."""

    @abstractmethod
    def shoot(self, victim: str, point: Point) -> str:
        """Kill the victim at that point, then try without; return what became of the tree."""
