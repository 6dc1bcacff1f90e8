"""Find the pages of a held tree in the guest."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from ovr.attempt.alive import Alive
from ovr.attempt.shared_object import mapper, reach
from ovr.attempt.targets import Target
from ovr.dump.memory import Placed
from ovr.guest.client.agent import Agent
from ovr.guest.client.requests import Portion
from ovr.guest.protocol import Touching
from ovr.images.shared import SharedMemory
from ovr.kernel import mm_space, types_that_fit
from ovr.memory.extents import Extents
from ovr.state import GuestTree

__all__ = ["reachable", "reader", "targets_of"]


def reachable(shared: SharedMemory | None) -> bool:
    """Tell whether the pages of a shared object can be read outside.

    The agent maps it by a task that has it, and for writing. None: no task has it.
    """
    return shared is not None and bool(shared.places) and not shared.sealed


def reader(agent: Agent, pid: int) -> Callable[[Extents], None]:
    """Return a function that has pages of a held task, or of a mapper, read in the guest.

    Args:
        agent: reads them.
        pid: the process, in the guest's initial pid namespace.
    """
    return lambda pieces: agent.touch(
        [Portion(pid, Touching.READ, pieces[["gva", "size"]].tolist())]
    )


def targets_of(
    placed: Sequence[Placed],
    objects: Mapping[int, SharedMemory],
    guest: GuestTree,
    agent: Agent,
) -> Iterator[Target]:
    """Yield the pages of each task, and of each shared object, with the address space to read them.

    Args:
        placed: the pages.
        objects: the shared objects by `shmid`.
        guest: the held tree.
        agent: maps shared objects, and is asked for pages that are not in memory.

    Raises:
        AttemptFailed: a task or an object is not there.
        GuestFault: invalid kernel objects in the guest.
        KernelNotFound: invalid types of its kernel.
        AgentUnreachable: the link broke.
    """
    for one in placed:
        if not len(one.pieces):
            continue
        if one.dumped.shared:
            yield _of_object(one, objects[one.dumped.number], guest, agent)
        else:
            yield _of_task(one, guest, agent)


@types_that_fit()
def _of_task(placed: Placed, guest: GuestTree, agent: Agent) -> Target:
    name = f"pid {placed.dumped.number}"
    task = guest.task(placed.dumped.number)
    space = mm_space(guest.kernel, task.mm)
    check = Alive(name, guest.kernel, task, space)
    return _target(placed, placed.pieces, check, agent, task.tgid)


def _of_object(placed: Placed, shared: SharedMemory, guest: GuestTree, agent: Agent) -> Target:
    name = f"shared memory {shared.shmid}"
    there = reach(shared, guest)
    ranges = placed.pieces[["gva", "size"]].tolist()
    mapped = agent.map(there.pid, there.way, there.size, ranges)
    pieces = placed.pieces.copy()
    pieces["gva"] += mapped.address
    check = mapper(name, guest.kernel, mapped.pid)
    return _target(placed, pieces, check, agent, mapped.pid)


def _target(placed: Placed, pieces: Extents, check: Alive, agent: Agent, pid: int) -> Target:
    return Target(
        name=check.name,
        space=check.space,
        frames=None,
        pieces=pieces,
        source=placed.sink,
        ask=reader(agent, pid),
        check=check,
    )
