"""Find shared memory of a held tree in the guest, and map it there for the host."""

from typing import NamedTuple

from ovr.attempt.alive import OF_THE_TASK, Alive
from ovr.errors import AttemptFailed
from ovr.images.shared import SharedMemory
from ovr.kernel import Kernel, Struct, find_task, find_vma, mm_space, types_that_fit
from ovr.memory.addresses import PAGE_SIZE, Gva
from ovr.state import GuestTree

__all__ = ["SharedObject", "mapper", "reach"]


class SharedObject(NamedTuple):
    """A shared object in the guest, as `Agent.map` reaches it.

    Attributes:
        pid: a task that has it, in the initial pid namespace.
        way: the path to it below ``/proc/PID``.
        mapping: GVA of its ``struct address_space``.
        size: its size in bytes; whole pages.
    """

    pid: int
    way: str
    mapping: Gva
    size: int


@types_that_fit()
def reach(shared: SharedMemory, guest: GuestTree) -> SharedObject:
    """Find a shared object of a held tree by its first place.

    Raises:
        AttemptFailed: it is not there.
        GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
    """
    place = shared.places[0]
    task = guest.task(place.pid)
    if place.fd is not None:
        file, way = guest.file(place.pid, place.fd), f"fd/{place.fd}"
    else:
        assert place.address is not None
        vma = find_vma(task.mm, Gva(place.address))
        if not (vma and vma.vm_file):
            raise AttemptFailed(
                f"shared memory {shared.shmid}: pid {place.pid} has nothing mapped at"
                f" {place.address:#x}",
                "report it, with the images",
            )
        file, way = vma.vm_file, f"map_files/{vma.vm_start:x}-{vma.vm_end:x}"
    mapping = file.f_mapping
    size = -(-mapping.host.i_size // PAGE_SIZE) * PAGE_SIZE
    return SharedObject(task.tgid, way, mapping.address_, size)


@types_that_fit()
def mapper(name: str, kernel: Kernel, pid: int) -> Alive:
    """Find the process of the agent that has mapped a shared object.

    Raises:
        AttemptFailed: it is not there.
        GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
    """
    task: Struct | None = find_task(kernel, pid)
    if task is None or not task.mm:
        raise AttemptFailed(f"the agent's process {pid} is not there", OF_THE_TASK)
    return Alive(name, kernel, task, mm_space(kernel, task.mm))
