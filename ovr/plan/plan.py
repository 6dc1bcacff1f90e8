"""Plan a restore: what goes outside, and what stays inside for which reason.

The plan depends only on the images. `areas` plans memory, `ovr.state` all other state.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from ovr.errors import UsageError
from ovr.images import ImageSet, Memory
from ovr.images.cow import Contents, ImageContents
from ovr.images.shared import shared_memory
from ovr.images.vma import without_content
from ovr.plan.areas import MemoryPlan, SharedPlan, TaskPlan, plan_shared, plan_tasks
from ovr.plan.pages import Reason
from ovr.plan.sharing import CowPlan
from ovr.state import KINDS, Setting
from ovr.state.settings import take

__all__ = ["NOT_DUMPED", "Plan", "SharedPlan", "TaskPlan", "check_kinds", "make_plan"]

ALL: Final = "all"
MEMORY: Final = "memory"
NOT_DUMPED: Final = "areas above 47 bits: CRIU does not dump their content, they become zeros"


@dataclass(frozen=True)
class Plan:
    """The plan for an image set.

    Attributes:
        images: the image set.
        tasks: the live tasks, parents first.
        shared: the shared memory that has content.
        cow: the pages that tasks share copy-on-write.
        settings: the values of all kinds of state that go outside.
    """

    images: ImageSet
    tasks: tuple[TaskPlan, ...]
    shared: tuple[SharedPlan, ...]
    cow: CowPlan
    settings: tuple[Setting, ...]

    @property
    def memories(self) -> tuple[MemoryPlan, ...]:
        """All memory: that of the tasks, then shared memory, each object once."""
        return *self.tasks, *self.shared

    def sources(self) -> Iterator[tuple[Memory, int]]:
        """Yield the pages images that are written from, with their levels in chains of dumps."""
        for memory in self.memories:
            for level in memory.pieces:
                yield memory.memory, level

    @property
    def bytes_total(self) -> int:
        """Size of all pages, in bytes."""
        return sum(memory.bytes_total for memory in self.memories)

    @property
    def bytes_outside(self) -> int:
        """Size of the pages that go outside, in bytes."""
        return sum(memory.bytes_outside for memory in self.memories)

    @property
    def bytes_cow(self) -> int:
        """Size of the pages that remain shared by parents and children, each written page once."""
        found = [task.by_reason() for task in self.tasks]
        return sum(by.get(Reason.COW, 0) + by.get(Reason.INHERITED, 0) for by in found)

    @cached_property
    def not_dumped(self) -> dict[int, int]:
        """Bytes of areas whose content CRIU has not dumped, by pid: they become zeros."""
        found: dict[int, int] = {}
        for plan in self.tasks:
            assert plan.task.vmas is not None
            areas = without_content(plan.task.vmas)
            if len(areas):
                found[plan.task.pid] = int((areas["end"] - areas["start"]).sum())
        return found

    def by_reason(self) -> dict[Reason, int]:
        """Return the bytes of each verdict in all memory."""
        found: dict[Reason, int] = {}
        for memory in self.memories:
            for reason, count in memory.by_reason().items():
                found[reason] = found.get(reason, 0) + count
        return dict(sorted(found.items()))

    @property
    def states(self) -> tuple[str, ...]:
        """The kinds of state that go outside."""
        memory = (MEMORY,) if self.bytes_outside else ()
        return memory + tuple(dict.fromkeys(setting.kind.name for setting in self.settings))


def make_plan(
    images: ImageSet,
    outside: Sequence[str] = (ALL,),
    *,
    force_write: bool = True,
    contents: Contents | None = None,
) -> Plan:
    """Decide for every run of pages and every kind of state.

    Args:
        images: the image set; it must stay open as long as the plan is used.
        outside: names of kinds of state, of groups of them, or ``all``.
        force_write: whether the guest's kernel lets the agent write to pages that the task itself
            cannot write to (FOLL_FORCE through ``/proc/PID/mem``).
        contents: compares pages; None: as they are in the images.

    Raises:
        UsageError: there is no such kind or group.
        ImagesDamaged, ImagesUnsupported: as `ImageSet.tasks`.
        ImagesForbidden, ImagesUnreachable: an image cannot be read.
    """
    asked = _asked(outside)
    memory = MEMORY in asked
    alive = [task for task in images.tasks if task.alive]
    tasks, cow = plan_tasks(alive, contents or ImageContents(), asked=memory, force=force_write)
    shared = plan_shared(shared_memory(images), asked=memory)
    for one in (*tasks, *shared):
        one.memory.check_readable()
    settings = take(images, (kind for kind in KINDS if kind.name in asked))
    return Plan(images, tasks, shared, cow, settings)


def check_kinds(outside: Sequence[str]) -> None:
    """Check the names of kinds of state.

    Raises:
        UsageError: there is no such kind or group.
    """
    _asked(outside)


def _asked(outside: Sequence[str]) -> set[str]:
    # The names of the kinds that these names and groups select.
    meant = {ALL: {MEMORY}, MEMORY: {MEMORY}}
    for kind in KINDS:
        for name in (ALL, kind.name, *kind.groups):
            meant.setdefault(name, set()).add(kind.name)
    if unknown := sorted({*outside} - {*meant}):
        raise UsageError(
            f"no kind or group of state is named {unknown[0]!r}",
            f"names are: {', '.join(sorted(meant))}; see `ovr states`",
        )
    return {name for word in outside for name in meant[word]}
