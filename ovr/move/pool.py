"""The destination's pool, which gets pages while the tree still runs in the source."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Final

import numpy as np

from ovr._fastcopy import OWNED, RUN
from ovr.attempt.attempt import Attempt
from ovr.attempt.origin import EVERYWHERE, Origin
from ovr.attempt.targets import Target
from ovr.dump.running import RunningTask, running_tasks
from ovr.errors import AttemptFailed, TaskDied
from ovr.guest.client.results import PoolInfo
from ovr.guest.client.session import AgentInfo
from ovr.kernel.linux.mm import (
    VM_DONTCOPY,
    VM_DONTDUMP,
    VM_GROWSDOWN,
    VM_LOCKED,
    VM_MERGEABLE,
    VM_NOHUGEPAGE,
    VM_NORESERVE,
    VM_READ,
    VM_WIPEONFORK,
    VM_WRITE,
)
from ovr.memory.extents import Extents, as_pieces, cut_to, total, with_flags
from ovr.memory.ranges import Ranges
from ovr.plan.pool.seats import RunningAreas, Seats, assign_seats
from ovr.plan.pool.units import UNIT

__all__ = ["PoolStore", "make_pool", "seats_of", "with_pool"]

_NOT_FOR_POOL: Final = (
    VM_GROWSDOWN | VM_LOCKED | VM_DONTCOPY | VM_DONTDUMP | VM_NORESERVE | VM_WIPEONFORK
    | VM_NOHUGEPAGE | VM_MERGEABLE
)  # fmt: skip
_WRITABLE: Final = VM_READ | VM_WRITE


def seats_of(attempt: Attempt, root_pid: int) -> Seats:
    """Assign a part of a pool to each area of a running tree that may use one.

    `ovr.plan.pool.layout` decides again when there are images, by stricter rules.

    Args:
        attempt: of the source.
        root_pid: the root task, in the guest's initial pid namespace.

    Raises:
        GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
    """
    tasks = [*running_tasks(attempt.vm.kernel, root_pid)]
    bounds = {task.pid: {(area.start, area.end) for area in task.mappings} for task in tasks}
    found = []
    for task in tasks:
        kin = [bounds.get(task.ppid, set())]
        kin += [bounds[other.pid] for other in tasks if other.ppid == task.pid]
        inherited = set[tuple[int, int]]().union(*kin)
        with suppress(TaskDied):
            areas = [*_areas(task, task.pages(attempt.holder), inherited)]
            found.append(RunningAreas(task.pid, task.ppid, areas))
    return assign_seats(found)


def _areas(
    task: RunningTask, pages: Extents, inherited: set[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    for area in task.mappings:
        if not area.anonymous or area.end - area.start < UNIT:
            continue
        if area.flags & _WRITABLE != _WRITABLE or area.flags & _NOT_FOR_POOL:
            continue
        bounds = np.array([area.start], "<u8"), np.array([area.end], "<u8")
        if (area.start, area.end) in inherited:
            continue
        if 2 * total(cut_to(pages, *bounds)) >= area.end - area.start:
            yield area.start, area.end


def make_pool(attempt: Attempt, seats: Seats) -> PoolInfo | None:
    """Have the destination allocate a pool for the attempt alone; None if nothing would use it.

    However the attempt ends, the guest gets it back with the end of its session, unless a restore
    has taken it.

    Args:
        attempt: of the destination.
        seats: parts of the pool.

    Raises:
        AttemptFailed: it lacks the memory, or cannot have a pool.
        AgentUnreachable: the link broke.
    """
    if not seats.size:
        return None
    made = attempt.agent.warm(seats.size, seats.place, keep=False)
    if made.size < seats.size:
        raise AttemptFailed(
            f"the destination has no pool of {seats.size >> 20} MiB: {made.note}",
            "free memory in its guest",
        )
    return made


def with_pool(guest: AgentInfo, pool: PoolInfo | None) -> AgentInfo:
    """Return the description of a guest that has this pool, or none."""
    if pool is None:
        return replace(guest, warm=0)
    return replace(guest, warm=pool.size, warm_at=pool.address)


class PoolStore:
    """A `ovr.dump.precopy.Store`: copies go to the pool, frame to frame.

    Args:
        source: the attempt that has the tree.
        destination: the attempt that has the pool.
        pool: the pool; None: there is none.
        seats: its parts.
    """

    def __init__(
        self, source: Attempt, destination: Attempt, pool: PoolInfo | None, seats: Seats
    ) -> None:
        self._pool = pool
        self._seats = seats.of if pool else {}
        self._owner = destination.find_pool(pool) if pool else None
        self._frames = destination.vm.kernel.private_frames
        self._copier = destination.copier(lambda count: None, origin=source.holder)

    def begin_round(self) -> None:
        """Do nothing."""

    def save(self, task: RunningTask, number: int, pages: Extents, before: Ranges) -> Extents:
        """Copy the pages of a task that have a place in the pool.

        Raises:
            TaskDied: the task has died, or the process with the pool.
            GuestFault: page tables of a guest are damaged.
        """
        pieces = self._pieces(task, pages)
        if self._owner is None or not len(pieces):
            return np.empty(0, RUN)
        origin = Origin(
            name=f"pid {task.pid}", space=task.space, places=EVERYWHERE, check=task.check,
            ask=lambda _: None, frames=task.frames,
        )  # fmt: skip
        target = Target(
            name="the pool", space=self._owner.space, frames=self._frames, pieces=pieces,
            source=origin, ask=lambda _: None, check=self._owner,
        )  # fmt: skip
        copied = [np.empty(0, RUN)]
        self._copier.copy_own(target, copied.append)
        return np.concatenate(copied)

    def end_round(self) -> None:
        """Do nothing."""

    def _pieces(self, task: RunningTask, pages: Extents) -> Extents:
        # In the pool; the offset is the address in the task.
        found = [as_pieces(pages[:0])]
        for seat in self._seats.get(task.pid, ()):
            assert self._pool is not None
            bounds = np.array([seat.low], "<u8"), np.array([seat.high], "<u8")
            part = as_pieces(cut_to(with_flags(pages, OWNED), *bounds))
            part["offset"] = part["gva"]
            part["gva"] -= np.uint64(seat.low)
            part["gva"] += np.uint64(self._pool.address + seat.at)
            found.append(part)
        return np.concatenate(found)
