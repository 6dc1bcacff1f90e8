"""The plan of a restore: what goes outside, what stays inside and why, and the inside image set.

The plan is made from the images alone. `memory_plan` places the pages, `state` has the rest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from ovr.errors import UsageError
from ovr.images import ImageSet, Memory
from ovr.images.shared import shared_memory
from ovr.images.vma import without_content
from ovr.plan.areas import MemoryPlan, SharedPlan, TaskPlan, plan_shared, plan_tasks
from ovr.plan.pages import Reason
from ovr.plan.sharing import CowPlan
from ovr.state import KINDS, Setting
from ovr.state.settings import take

__all__ = ["NOT_DUMPED", "Plan", "SharedPlan", "TaskPlan", "make_plan"]

ALL: Final = "all"
MEMORY: Final = "memory"
NOT_DUMPED: Final = "areas above 47 bits: CRIU dumps no content of them, they come back as zeros"


@dataclass(frozen=True)
class Plan:
    """The plan for an image set.

    Attributes:
        images: the image set.
        tasks: those that are alive, parents first.
        shared: the shared memory that has content.
        cow: what tasks share copy-on-write.
        settings: the values of all kinds of state that go outside.
    """

    images: ImageSet
    tasks: tuple[TaskPlan, ...]
    shared: tuple[SharedPlan, ...]
    cow: CowPlan
    settings: tuple[Setting, ...]

    @property
    def memories(self) -> tuple[MemoryPlan, ...]:
        """All memory: the tasks', then what is shared, each object once."""
        return *self.tasks, *self.shared

    def sources(self) -> Iterator[tuple[Memory, int]]:
        """Yield the pages images that are written from, with their levels in chains of dumps."""
        for memory in self.memories:
            for level in memory.pieces:
                yield memory.memory, level

    @property
    def bytes_total(self) -> int:
        """All pages, in bytes."""
        return sum(memory.bytes_total for memory in self.memories)

    @property
    def bytes_outside(self) -> int:
        """Those of them that go outside."""
        return sum(memory.bytes_outside for memory in self.memories)

    @property
    def bytes_cow(self) -> int:
        """Those of them that parents and children go on sharing, but those written outside."""
        found = [task.by_reason() for task in self.tasks]
        return sum(by.get(Reason.COW, 0) + by.get(Reason.INHERITED, 0) for by in found)

    @cached_property
    def not_dumped(self) -> dict[int, int]:
        """Bytes of areas whose content CRIU has not dumped, by pid: they come back as zeros."""
        found: dict[int, int] = {}
        for plan in self.tasks:
            assert plan.task.vmas is not None
            areas = without_content(plan.task.vmas)
            if len(areas):
                found[plan.task.pid] = int((areas["end"] - areas["start"]).sum())
        return found

    def by_reason(self) -> dict[Reason, int]:
        """Bytes by verdict, of all memory."""
        found: dict[Reason, int] = {}
        for memory in self.memories:
            for reason, count in memory.by_reason().items():
                found[reason] = found.get(reason, 0) + count
        return dict(sorted(found.items()))

    @property
    def states(self) -> tuple[str, ...]:
        """The kinds of state of which something goes outside."""
        memory = (MEMORY,) if self.bytes_outside else ()
        return memory + tuple(dict.fromkeys(setting.kind.name for setting in self.settings))


def make_plan(
    images: ImageSet, outside: Sequence[str] = (ALL,), *, force_write: bool = True
) -> Plan:
    """Decide for every run of pages and every kind of state.

    Args:
        images: the image set; it must stay open as long as the plan is used.
        outside: names of kinds of state, of groups of them, or ``all``.
        force_write: whether the guest's kernel lets the agent write to pages that the task itself
            cannot write to (FOLL_FORCE through ``/proc/PID/mem``).

    Raises:
        UsageError: there is no such kind or group.
        ImagesDamaged, ImagesUnsupported: as `ImageSet.tasks`.
        ImagesForbidden, ImagesUnreachable: an image cannot be read.
    """
    asked = _asked(outside)
    memory = MEMORY in asked
    alive = [task for task in images.tasks if task.alive]
    tasks, cow = plan_tasks(alive, asked=memory, force=force_write)
    shared = plan_shared(shared_memory(images), asked=memory)
    for one in (*tasks, *shared):
        one.memory.check_readable()
    settings = take(images, (kind for kind in KINDS if kind.name in asked))
    return Plan(images, tasks, shared, cow, settings)


def _asked(outside: Sequence[str]) -> set[str]:
    # The names of the kinds that are meant.
    meant = {ALL: {MEMORY}, MEMORY: {MEMORY}}
    for kind in KINDS:
        for name in (ALL, kind.name, *kind.groups):
            meant.setdefault(name, set()).add(kind.name)
    if unknown := sorted({*outside} - {*meant}):
        raise UsageError(
            f"there is no kind of state called {unknown[0]!r}",
            f"take some of: {', '.join(sorted(meant))}; `ovr states` explains them",
        )
    return {name for word in outside for name in meant[word]}
