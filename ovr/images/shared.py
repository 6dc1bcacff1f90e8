"""Find the shared memory of an image set, and its mappings and descriptors.

The pages of anonymous shared mappings, memfds and SysV segments are not in a task's pagemap but in
``pagemap-shmem-SHMID.img``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ovr.images.imageset import ImageSet
from ovr.images.objects import FdinfoEntry, FileEntry, MemfdInodeEntry
from ovr.images.task import Memory, Task
from ovr.images.vma import VMA_ANON_SHARED, VMA_AREA_MEMFD, VMA_AREA_SYSVIPC

__all__ = ["SharedMemory", "SharedPlace", "shared_memory"]

_SEALED = 0x8 | 0x10  # F_SEAL_WRITE, F_SEAL_FUTURE_WRITE


@dataclass(frozen=True)
class SharedPlace:
    """A mapping or a descriptor by which a task refers to a shared object.

    Attributes:
        pid: the task, as in the images.
        address: the start of the mapping, a GVA; None for a descriptor.
        fd: the descriptor; None for a mapping.
    """

    pid: int
    address: int | None = None
    fd: int | None = None


@dataclass(frozen=True)
class SharedMemory:
    """One shared object with content.

    Attributes:
        shmid: its number in the images.
        memory: its pages; ``gva`` is an offset in the object, in bytes.
        places: its mappings and descriptors; may be empty.
        sealed: it cannot be mapped for writing any more.
    """

    shmid: int
    memory: Memory
    places: tuple[SharedPlace, ...]
    sealed: bool


def shared_memory(images: ImageSet) -> tuple[SharedMemory, ...]:
    """Return all shared objects of an image set that have pages in it.

    Raises:
        ImagesDamaged, ImagesUnsupported: as `ImageSet.tasks`.
    """
    inodes = {inode.shmid: inode for inode in images.entries("memfd.img", MemfdInodeEntry)}
    files = _memfd_files(images, {inode.inode_id: shmid for shmid, inode in inodes.items()})
    places: dict[int, list[SharedPlace]] = {}
    alive = [task for task in images.tasks if task.alive]
    for shmid, place in _open(images, alive, files):
        places.setdefault(shmid, []).append(place)
    for task in alive:
        for shmid, place in _mapped(task, files):
            places.setdefault(shmid, []).append(place)
    return tuple(
        SharedMemory(
            shmid,
            memory,
            tuple(places.get(shmid, ())),
            sealed=shmid in inodes and bool(inodes[shmid].seals & _SEALED),
        )
        for shmid, memory in images.shared.items()
    )


def _memfd_files(images: ImageSet, shmid_of: Mapping[int, int]) -> dict[int, int]:
    # The shmid of each open memfd, by the id of the open file.
    return {
        entry.id: shmid_of[entry.memfd.inode_id]
        for entry in images.entries("files.img", FileEntry)
        if entry.HasField("memfd") and entry.memfd.inode_id in shmid_of
    }


def _open(
    images: ImageSet, alive: list[Task], files: Mapping[int, int]
) -> Iterator[tuple[int, SharedPlace]]:
    for task in alive:
        for entry in images.entries(f"fdinfo-{images.ids(task).files_id}.img", FdinfoEntry):
            if entry.id in files:
                yield files[entry.id], SharedPlace(task.pid, fd=entry.fd)


def _mapped(task: Task, files: Mapping[int, int]) -> Iterator[tuple[int, SharedPlace]]:
    assert task.vmas is not None
    shared = VMA_ANON_SHARED | VMA_AREA_SYSVIPC | VMA_AREA_MEMFD
    for vma in task.vmas[task.vmas["status"] & shared != 0]:
        shmid, status = int(vma["shmid"]), int(vma["status"])
        if status & VMA_AREA_MEMFD:
            # Private mappings too: they refer to the object as well.
            if shmid not in files:
                continue
            shmid = files[shmid]
        yield shmid, SharedPlace(task.pid, address=int(vma["start"]))
