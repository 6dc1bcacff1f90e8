"""Open, decode and cross-check a directory of CRIU images."""

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self, TypeVar, cast

from google.protobuf.message import Message

from ovr.errors import ImagesDamaged, ImagesUnsupported, UsageError
from ovr.host.closing import Closing
from ovr.images.chain import resolve
from ovr.images.directory import ImageDirectory, ImageFile
from ovr.images.framing import DUMP_AGAIN, check_header, decode, frames, is_raw
from ovr.images.messages import (
    CoreEntry,
    FsEntry,
    IdsEntry,
    InventoryEntry,
    MmEntry,
    PstreeEntry,
)
from ovr.images.objects import IpcShmEntry, MemfdInodeEntry
from ovr.images.packed import HEAD_SIZE, refuse_packed
from ovr.images.pagemap import MAX_PAGEMAP, Pagemap, check_pages_size, decode_pagemap
from ovr.images.task import (
    Memory,
    Task,
    TaskState,
    check_core,
    check_ids,
    check_memory,
    check_tree,
)
from ovr.images.vma import VMA_ANON_SHARED, VMA_AREA_SYSVIPC, vma_array
from ovr.memory.addresses import PAGE_SIZE

__all__ = ["ImageSet"]

_VERSION: Final = 2  # CRTOOLS_IMAGES_V1_1: all of CRIU 2.0 to 4.2
_MAX_LEVELS: Final = 128
_LONGEST_HEADER: Final = 8

M = TypeVar("M", bound=Message)


class ImageSet(Closing):
    """The images of one ``criu dump``, read-only. Use as a context manager, or `close` it.

    The inventory and the header of every image are checked on opening; tasks and memory are decoded
    on first use. Returned entries and extents are shared and cached: change copies only.

    Args:
        directory: the directory of the images; closed with the image set.

    Attributes:
        path: the directory, or the archive that contains it.
    """

    def __init__(self, directory: ImageDirectory) -> None:
        self.path = directory.path
        self._levels = [directory]
        self._decoded: dict[tuple[str, type[Message]], tuple[Message, ...]] = {}
        try:
            self._check_headers()
            self._check_inventory()
            self._open_parents()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the images in the directory `path`.

        Raises:
            UsageError: no such directory, or no images in it.
            ImagesDamaged: a file is missing or truncated, or has another image's header.
            ImagesUnsupported: an unknown image type or version, or files that are not regular.
        """
        return cls(ImageDirectory(path))

    def close(self) -> None:
        """Close the directories."""
        for directory in self._levels:
            directory.close()

    @property
    def levels(self) -> tuple[ImageDirectory, ...]:
        """Its own directory and those of the previous dumps, latest first."""
        return tuple(self._levels)

    @property
    def names(self) -> tuple[str, ...]:
        """The file names of all images, in order."""
        return tuple(name for name in self._levels[0].sizes if name.endswith(".img"))

    def file(self, name: str) -> ImageFile:
        """Return the image file `name`."""
        return self._levels[0].file(name)

    def has(self, name: str) -> bool:
        """Return whether there is a file `name`, an image or not."""
        return name in self._levels[0].sizes

    def read(self, name: str) -> bytes:
        """Return the whole content of the image `name`."""
        return self._levels[0].read(name)

    def entries(self, name: str, kind: type[M]) -> tuple[M, ...]:
        """Return all entries of an image; none if there is no such image, as in CRIU.

        For images without raw bytes between the entries. `kind` is a message of
        `ovr.images.messages` or `ovr.images.objects`. Entries are decoded once and shared by all
        callers: change copies only.

        Raises:
            ImagesDamaged, ImagesUnsupported: as for `open`.
        """
        if name not in self._levels[0].sizes:
            return ()
        found = self._decoded.get((name, kind))
        if found is None:
            read = frames(self.read(name), name)
            found = tuple(decode(kind, frame.payload, name) for frame in read)
            self._decoded[name, kind] = found
        return cast(tuple[M, ...], found)

    @cached_property
    def inventory(self) -> InventoryEntry:
        """The entry of ``inventory.img``."""
        return self._only("inventory.img", InventoryEntry)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, parents before children, checked against one another.

        Raises:
            ImagesDamaged: images are missing or contradict each other.
            ImagesUnsupported: they contain something that cannot be restored.
        """
        entries = self.entries("pstree.img", PstreeEntry)
        check_ids(entry.pid for entry in entries)
        tasks = tuple(self._task(entry) for entry in entries)
        if not tasks:
            raise ImagesDamaged("pstree.img: no tasks", DUMP_AGAIN)
        check_tree(tasks)
        return tasks

    @cached_property
    def shared(self) -> Mapping[int, Memory]:
        """Shared memory with content, by `shmid`; `gva` is an offset in the object, in bytes."""
        names = {shmid: f"pagemap-shmem-{shmid}.img" for shmid in sorted(self._shmids())}
        present = {shmid: name for shmid, name in names.items() if name in self._levels[0].sizes}
        return MappingProxyType({shmid: self._memory(name) for shmid, name in present.items()})

    @cached_property
    def memories(self) -> tuple[Memory, ...]:
        """All memory in the images: that of the tasks, then shared memory.

        Raises:
            ImagesDamaged: two pagemaps refer to the same pages image.
        """
        own = (task.memory for task in self.tasks if task.memory is not None)
        memories = (*own, *self.shared.values())
        owner: dict[int, str] = {}
        for memory in memories:
            if owner.setdefault(memory.pages_id, memory.name) != memory.name:
                raise ImagesDamaged(
                    f"{memory.name}: has the same pages image as {owner[memory.pages_id]}",
                    DUMP_AGAIN,
                )
        return memories

    def ids(self, task: Task) -> IdsEntry:
        """Return the ids of the kernel objects that a live task may share with others.

        Raises:
            ImagesDamaged: the image is missing.
        """
        return self._only(f"ids-{task.pid}.img", IdsEntry)

    def _shmids(self) -> set[int]:
        """Return the ids of shared memory that VMAs, memfds and SysV segments refer to."""
        found = {inode.shmid for inode in self.entries("memfd.img", MemfdInodeEntry)}
        for task in self.tasks:
            if task.vmas is not None:
                named = task.vmas["status"] & (VMA_ANON_SHARED | VMA_AREA_SYSVIPC) != 0
                found.update(task.vmas["shmid"][named].tolist())
        for name in self.names:
            if name.startswith("ipcns-shm-"):
                segments = frames(self.read(name), name, partial(_content_size, name))
                found.update(decode(IpcShmEntry, s.payload, name).desc.id for s in segments)
        return found

    def _check_headers(self) -> None:
        if not self.names:
            for name in self._levels[0].sizes:
                file = self.file(name)
                refuse_packed(file.read(0, min(file.size, HEAD_SIZE)), name)
            raise UsageError(
                f"{self.path}: no CRIU images in this directory",
                "give the directory that `criu dump -D` wrote; unpack archives and streams first",
            )
        for name in sorted(self._levels[0].others):
            if name.endswith(".img"):
                self.file(name)
        for name in self.names:
            if not is_raw(name):
                file = self.file(name)
                check_header(file.read(0, min(file.size, _LONGEST_HEADER)), name)

    def _check_inventory(self) -> None:
        version = self.inventory.img_version
        if not version:
            raise ImagesUnsupported(
                "inventory.img: images of a pre-dump, which contains only memory",
                "give the directory of the dump that was made after it; its `parent` leads here",
            )
        if version != _VERSION:
            raise ImagesUnsupported(
                f"inventory.img: image version {version}, this tool reads version {_VERSION}",
                "dump with CRIU 3.17 to 4.2, without --compress",
            )

    def _open_parents(self) -> None:
        while parent := self._levels[-1].parent():
            self._levels.append(parent)
            if len(self._levels) > _MAX_LEVELS:
                raise ImagesUnsupported(
                    f"parent: more than {_MAX_LEVELS} levels, or a cycle",
                    "check the `parent` links; dump again in full",
                )

    def _only(self, name: str, kind: type[M]) -> M:
        """Return the only entry of an image that must exist."""
        self.file(name)
        entries = self.entries(name, kind)
        if len(entries) != 1:
            raise ImagesDamaged(f"{name}: {len(entries)} entries instead of 1", DUMP_AGAIN)
        return entries[0]

    def _core(self, tid: int, leader: bool) -> CoreEntry:
        name = f"core-{tid}.img"
        core = self._only(name, CoreEntry)
        check_core(core, name, leader)
        return core

    def _task(self, entry: PstreeEntry) -> Task:
        pid = entry.pid
        leader = self._core(pid, leader=True)
        ids = (pid, entry.ppid, entry.pgid, entry.sid)
        if leader.tc.task_state in (TaskState.DEAD, TaskState.ZOMBIE):
            return Task(*ids, (pid,), {pid: leader}, None, None, None, None)
        if pid not in entry.threads:
            raise ImagesDamaged(f"pstree.img: task {pid} is not among its threads", DUMP_AGAIN)
        check_ids(entry.threads)  # only here: those of a dead task are garbage
        threads = (pid, *(tid for tid in entry.threads if tid != pid))
        cores = {tid: self._core(tid, leader=False) for tid in threads[1:]} | {pid: leader}
        mm = self._only(f"mm-{pid}.img", MmEntry)
        vmas = vma_array(mm.vmas, f"mm-{pid}.img")
        memory = self._memory(f"pagemap-{pid}.img")
        check_memory(pid, memory, vmas)
        fs = self.entries(f"fs-{pid}.img", FsEntry)
        return Task(*ids, threads, cores, mm, vmas, memory, fs[0] if fs else None)

    def _memory(self, name: str) -> Memory:
        self.file(name)
        pagemaps = []
        for directory in self._levels:
            if name not in directory.sizes:
                break
            label = f"{directory.label}{name}"
            pagemaps.append(decode_pagemap(directory.read(name, MAX_PAGEMAP), label))
        entries = resolve([pagemap.entries for pagemap in pagemaps], name)
        used = set(entries["level"].tolist())
        files = tuple(
            _pages_file(directory, pagemap) if level in used else None
            for level, (directory, pagemap) in enumerate(zip(self._levels, pagemaps, strict=False))
        )
        return Memory(name, pagemaps[0].pages_id, pagemaps[0].compat, entries, files)


def _content_size(name: str, payload: bytes) -> int:
    """Return the number of raw bytes after an ``ipcns-shm`` entry (ipc_ns.c: rounded up to 4)."""
    segment = decode(IpcShmEntry, payload, name)
    return 0 if segment.in_pagemaps else (segment.size + 3) & ~3


def _pages_file(directory: ImageDirectory, pagemap: Pagemap) -> ImageFile:
    file = directory.file(f"pages-{pagemap.pages_id}.img")
    if file.size % PAGE_SIZE:  # else a page of the task may begin like a packed file
        refuse_packed(file.read(0, min(file.size, HEAD_SIZE)), file.label)
    check_pages_size(pagemap, file.size, file.label)
    return file
