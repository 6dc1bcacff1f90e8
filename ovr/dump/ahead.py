"""Do what can be done before the tree is stopped.

To allocate room for the pages takes longer than to copy them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from ovr.attempt.attempt import Attempt
from ovr.attempt.sink import Sink
from ovr.attempt.targets import Target
from ovr.dump.copied import CopiedImages
from ovr.dump.memory import Dumped
from ovr.dump.output import NewImages, Staging, writable
from ovr.dump.precopy import PreCopy
from ovr.dump.running import RunningTask, running_tasks
from ovr.errors import TaskDied
from ovr.guest.client.agent import Agent
from ovr.memory.extents import total
from ovr.vm.hold import Holder

__all__ = ["Ahead", "Room", "work_ahead"]


@dataclass(frozen=True)
class Ahead:
    """What was done: pages that were copied, if they were to be, and room for others."""

    pre_copy: PreCopy | None
    images: CopiedImages
    room: "Room"

    def unchanged(self, agent: Agent, stack: ExitStack) -> Iterator[Target]:
        """Yield the pages that were copied and have not changed, with their images.

        Args:
            agent: asked for pages that are not in memory any more.
            stack: closes the images.
        """
        if self.pre_copy:
            yield from self.images.targets(self.pre_copy.copies, agent, stack)

    def let_stop(self, agent: Agent) -> None:
        """Let CRIU stop the tree, with its soft-dirty bits cleared.

        Raises:
            CriuFailed, AttemptFailed, AgentUnreachable: as `Agent.track`.
            GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
        """
        if self.pre_copy:
            self.pre_copy.let_stop()
        else:
            agent.track(stop=True)


def work_ahead(attempt: Attempt, root_pid: int, output: Staging, pre_copies: int) -> Ahead:
    """Copy pages while the tree runs, or only make room for them.

    Args:
        attempt: the attempt, with CRIU started.
        root_pid: the root task, in the guest's initial pid namespace.
        output: gets the images.
        pre_copies: copy them, in so many rounds, or `AS_MANY_AS_HELP`; 0: do not.

    Raises:
        AttemptFailed: the tree cannot be frozen.
        UsageError: the images cannot be written.
        GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
        AgentUnreachable: the link broke.
    """
    images = CopiedImages(attempt, output)
    pre_copy = PreCopy(attempt, root_pid, images) if pre_copies else None
    ahead = Ahead(pre_copy, images, Room(output.images))
    if pre_copy:
        pre_copy.run(pre_copies)
    else:
        ahead.room.make(running_tasks(attempt.vm.kernel, root_pid), attempt.holder)
    return ahead


class Room:
    """Pages images with room for the pages of tasks.

    Args:
        images: gets them.
    """

    def __init__(self, images: NewImages) -> None:
        self._images = images
        self._of: dict[int, Sink] = {}

    def make(self, tasks: Iterator[RunningTask], holder: Holder) -> None:
        """Allocate as much as the tasks have now.

        Raises:
            UsageError: there is no space for it.
            GuestFault: page tables of the guest are damaged.
        """
        for task in tasks:
            with suppress(TaskDied):
                if size := total(task.pages(holder)):
                    name = f".pages-of-{task.pid}"
                    sink = self._of[task.pid] = self._images.sink(name, size)
                    with writable(self._images.path / name):
                        sink.allocate()

    def sink(self, dumped: Dumped, size: int) -> Sink:
        """Return the pages image of a task or shared object, with room for `size` bytes.

        Raises:
            UsageError: there is no space for it.
        """
        sink = None if dumped.shared else self._of.pop(dumped.number, None)
        if sink is None:
            return self._images.sink(dumped.pages_name, size)
        with writable(self._images.path / dumped.pages_name):
            (self._images.path / sink.name).rename(self._images.path / dumped.pages_name)
            sink.name = dumped.pages_name
            sink.resize(size)
        return sink

    def close(self) -> None:
        """Remove what was not used."""
        for sink in self._of.values():
            sink.close()
            (self._images.path / sink.name).unlink(missing_ok=True)
        self._of.clear()
