"""What the plan writes outside, found in the guest: address spaces, frames, sources.

The frames are there already, or are asked for here: CRIU has populated pieces of areas, the agent
touches the other pages of tasks, and maps each shared object in a process of its own, whose page
table leads to the object's pages. So nothing of this is seen in the restored tasks.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np

from ovr.addresses import PAGE_SIZE, Gva
from ovr.errors import RestoreFailed
from ovr.images.source import Sources
from ovr.kernel import Kernel, Struct, find_task, find_vma, mm_space
from ovr.memory_plan import SharedPlan, TaskPlan
from ovr.placement import Runs
from ovr.plan import Plan
from ovr.state import GuestTree
from ovr.state.memory import Target
from ovr.vm.agent import Agent

__all__ = ["targets"]

_OF_THE_TASK: Final = "was it killed? look for the OOM killer in the guest's kernel log"


def targets(plan: Plan, guest: GuestTree, agent: Agent, sources: Sources) -> tuple[Target, ...]:
    """Have the guest allocate what the plan writes outside, and return where it is.

    Raises:
        RestoreFailed: the guest has no memory for it, or the skeleton is not what was planned.
        GuestFault: kernel objects of the guest make no sense.
        AgentUnreachable: the link broke.
    """
    found = [target for task in plan.tasks for target in _of_task(task, guest, agent, sources)]
    for shared in plan.shared:
        found += _of_shared(shared, guest, agent, sources)
    return tuple(found)


def _of_task(plan: TaskPlan, guest: GuestTree, agent: Agent, sources: Sources) -> Iterator[Target]:
    if not plan.bytes_outside:
        return
    task = guest.task(plan.task.pid)
    space = mm_space(guest.kernel, task.mm)
    pid: int = task.tgid

    def ask(pieces: Runs) -> None:
        agent.touch(pid, pieces[["gva", "size"]].tolist(), keep=True)

    _touch(plan, agent, pid)
    for level, pieces in plan.pieces.items():
        yield Target(
            name=f"pid {plan.task.pid}",
            space=space,
            frames=guest.kernel.private_frames,
            pieces=pieces,
            source=sources.of(plan.memory, level),
            source_name=plan.memory.pages_name,
            ask=ask,
            spared=plan.spared,
        )


def _touch(plan: TaskPlan, agent: Agent, pid: int) -> None:
    ranges = plan.to_touch()
    # Where the kernel has written something meanwhile, it must stay.
    precious = _overlaps(ranges, plan.spared)
    for keep in (False, True):
        chosen = ranges[precious == keep]
        sizes = (chosen["end"] - chosen["start"]).tolist()
        agent.touch(pid, zip(chosen["start"].tolist(), sizes, strict=True), keep=keep)


def _overlaps(ranges: Runs, others: Runs) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    # Which of the ranges have a page in common with one of the others; both are sorted.
    low = others["start"] // np.uint64(PAGE_SIZE) * np.uint64(PAGE_SIZE)
    first = np.searchsorted(others["end"], ranges["start"], side="right")
    last = np.searchsorted(low, ranges["end"], side="left")
    return first < last


def _of_shared(
    plan: SharedPlan, guest: GuestTree, agent: Agent, sources: Sources
) -> Iterator[Target]:
    if not plan.bytes_outside:
        return
    pid, file, name = _reach(plan, guest)
    mapping = file.f_mapping
    size = -(-mapping.host.i_size // PAGE_SIZE) * PAGE_SIZE
    ranges = plan.to_touch()
    sizes = (ranges["end"] - ranges["start"]).tolist()
    if not len(ranges) or int(ranges["end"][-1]) > size:
        raise RestoreFailed(
            f"shared memory {plan.shared.shmid}: {size} bytes in the guest, fewer than in the"
            " images",
            "report it, with the images",
        )
    mapped = agent.map(pid, name, size, zip(ranges["start"].tolist(), sizes, strict=True))
    task = _mapper(guest.kernel, mapped.pid)

    def ask(pieces: Runs) -> None:
        agent.touch(mapped.pid, pieces[["gva", "size"]].tolist(), keep=True)

    for level, pieces in plan.pieces.items():
        here = pieces.copy()
        here["gva"] += np.uint64(mapped.address)
        yield Target(
            name=f"shared memory {plan.shared.shmid}",
            space=mm_space(guest.kernel, task.mm),
            frames=guest.kernel.shared_frames(Gva(mapping.address_)),
            pieces=here,
            source=sources.of(plan.memory, level),
            source_name=plan.memory.pages_name,
            ask=ask,
        )


def _reach(plan: SharedPlan, guest: GuestTree) -> tuple[int, Struct, str]:
    # A task's pid for the agent, the struct file of the object, and the agent's way to it.
    place = plan.shared.places[0]
    task = guest.task(place.pid)
    pid: int = task.tgid
    if place.fd is not None:
        return pid, guest.file(place.pid, place.fd), f"fd/{place.fd}"
    assert place.address is not None
    vma = find_vma(task.mm, Gva(place.address))
    if not (vma and vma.vm_file):
        raise RestoreFailed(
            f"shared memory {plan.shared.shmid}: pid {place.pid} has nothing mapped at"
            f" {place.address:#x}",
            "report it, with the images",
        )
    return pid, vma.vm_file, f"map_files/{vma.vm_start:x}-{vma.vm_end:x}"


def _mapper(kernel: Kernel, pid: int) -> Struct:
    task: Struct | None = find_task(kernel, pid)
    if task is None or not task.mm:
        raise RestoreFailed(f"the agent's process {pid} is not there", _OF_THE_TASK)
    return task
