"""VMs in which victims of a restore, dump or move are killed, booted when there are none."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from ovr import lab
from tests import subject
from tests.kill.attempt import Event, Story, events_of
from tests.kill.steps import Point

__all__ = ["Place", "crashes"]

_TROUBLE = re.compile(
    r"^.*(?:Oops|BUG:|Kernel panic|segfault|ERROR: \w+Sanitizer|panicked at).*$",
    re.MULTILINE,
)


def crashes(vm: lab.LabVm) -> list[str]:
    """Return lines that tell of crashes of a guest, or of the daemon of its vsock device.

    See `tests.tcg` for stale int3. vhost-device-vsock panics, and serves its VM no longer, if a
    client closes a connection before the guest has accepted it.
    """
    logs = [vm.console, vm.console.with_name("vsock.log")]
    texts = [log.read_text("utf-8", "replace") for log in logs if log.exists()]
    return [line for text in texts for line in _TROUBLE.findall(text)]


class Place(ABC):
    """VMs, and the events of one restore, dump or move in them.

    Args:
        boots: boot one VM each.
        scratch: a directory for this run.

    Attributes:
        story: restore, dump or move.
        temporary: where it has its temporary files.
    """

    story: ClassVar[Story]

    def __init__(self, boots: Sequence[Callable[[], lab.LabVm]], scratch: Path) -> None:
        self._boots = boots
        self.temporary = scratch / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self._vms: list[lab.LabVm | None] = [None] * len(boots)

    @property
    def vms(self) -> list[lab.LabVm]:
        """VMs that run."""
        return [self._running(number) for number in range(len(self._boots))]

    @property
    def vm(self) -> lab.LabVm:
        """The VM, if there is but one."""
        [vm] = self.vms
        return vm

    @cached_property
    def events(self) -> list[Event]:
        """Events of one that nothing happens to."""
        events_of(self.command(), self.temporary)  # the first is slow
        return events_of(self.command(), self.temporary)

    def _running(self, number: int) -> lab.LabVm:
        vm = self._vms[number]
        if vm is None or not vm.alive:
            self._down(number)
            vm = self._vms[number] = self._boots[number]()
            subject.install(vm)
        return vm

    def _down(self, number: int) -> None:
        if (vm := self._vms[number]) is not None:
            vm.down()
            self._vms[number] = None

    def down(self) -> None:
        """End the VMs."""
        for number in range(len(self._vms)):
            self._down(number)

    def trouble(self) -> list[str]:
        """Lines that tell of crashes, in the logs of the VMs."""
        return [line for vm in self._vms if vm is not None for line in crashes(vm)]

    @abstractmethod
    def command(self) -> list[str]:
        """Make the VMs ready for one restore, dump or move, and return its command."""

    @abstractmethod
    def shoot(self, victim: str, point: Point) -> str:
        """Kill the victim at that point, then try without; return what became of the tree."""
