"""Represent one task of an image set, decoded and checked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ovr.errors import ImagesDamaged, ImagesUnsupported
from ovr.images.chain import covered
from ovr.images.directory import ImageFile
from ovr.images.framing import DUMP_AGAIN
from ovr.images.messages import CoreEntry, FsEntry, MmEntry
from ovr.images.pagemap import USER_END
from ovr.images.vma import Vmas, is_private
from ovr.memory.addresses import PAGE_SHIFT, PAGE_SIZE
from ovr.memory.extents import Extents
from ovr.memory.ranges import RANGE, Ranges, join

__all__ = ["Memory", "Task", "TaskState", "rseq_areas"]


class TaskState(IntEnum):
    """``tc.task_state`` of a core image (``compel/include/uapi/task-state.h``)."""

    ALIVE = 1
    DEAD = 2
    STOPPED = 3
    ZOMBIE = 6


@dataclass(frozen=True)
class Memory:
    """The pages that one pagemap image describes: a task's private ones, or shared memory.

    Attributes:
        name: file name of the pagemap image.
        pages_id: N of its ``pages-N.img``.
        compat: written by CRIU before 4.2 (see `Pagemap`).
        entries: location of every page's data, references to parent images resolved; ascending,
            read-only, all with PE_PRESENT.
        files: the pages images by `level`: of the image set itself, of its parent, and so on;
            None where no data of that level is used.
    """

    name: str
    pages_id: int
    compat: bool
    entries: Extents
    files: tuple[ImageFile | None, ...]

    @property
    def pages_name(self) -> str:
        """File name of the pages image."""
        return f"pages-{self.pages_id}.img"

    def check_readable(self) -> None:
        """Check that the pages images of all used levels can be read.

        Raises:
            ImagesDamaged, ImagesForbidden, ImagesUnreachable: one cannot.
        """
        for file in self.files:
            if file is not None:
                file.check_readable()

    def file(self, level: int = 0) -> ImageFile:
        """Return the pages image of that level."""
        file = self.files[level]
        if file is None:
            raise ValueError(f"{self.name} uses no data of level {level}")
        return file


@dataclass(frozen=True)
class Task:
    """A process.

    Attributes:
        pid, ppid, pgid, sid: as in its pid namespace; `ppid` is 0 for the root.
        threads: thread ids, the leader's (`pid`) first; only the leader's for a dead task.
        cores: the core image of each thread.
        mm: memory descriptor; None for a dead task.
        vmas: its memory areas: row i is ``mm.vmas[i]``; None for a dead task.
        memory: its private pages; None for a dead task.
        fs: working directory, root and umask; None if the images lack it.
    """

    pid: int
    ppid: int
    pgid: int
    sid: int
    threads: tuple[int, ...]
    cores: Mapping[int, CoreEntry]
    mm: MmEntry | None
    vmas: Vmas | None
    memory: Memory | None
    fs: FsEntry | None

    @property
    def core(self) -> CoreEntry:
        """The core image of the leader."""
        return self.cores[self.pid]

    @property
    def state(self) -> TaskState:
        """Alive, stopped or dead."""
        return TaskState(self.core.tc.task_state)

    @property
    def alive(self) -> bool:
        """Whether the task has memory, files and threads, that is, is not a zombie."""
        return self.mm is not None

    @property
    def comm(self) -> str:
        """Its name; bytes that are not UTF-8 are escaped."""
        return self.core.tc.comm.decode("utf-8", "backslashreplace")

    @property
    def rseq_areas(self) -> Ranges:
        """GVA ranges of the ``struct rseq`` that its threads have registered, sorted."""
        return rseq_areas(self.cores.values())

    @property
    def umask(self) -> int | None:
        """The file mode creation mask, or None if the images lack it."""
        return self.fs.umask if self.fs is not None and self.fs.HasField("umask") else None


def rseq_areas(cores: Iterable[CoreEntry]) -> Ranges:
    """Return the GVA ranges of the ``struct rseq`` that these threads have registered, sorted."""
    areas = [
        (rseq.rseq_abi_pointer, rseq.rseq_abi_pointer + rseq.rseq_abi_size)
        for core in cores
        if core.thread_core.HasField("rseq_entry")
        for rseq in [core.thread_core.rseq_entry]
        if rseq.rseq_abi_pointer < USER_END and rseq.rseq_abi_size <= PAGE_SIZE
    ]
    return join(np.array(areas, dtype=RANGE))


def check_core(core: CoreEntry, name: str, leader: bool) -> None:
    """Check that a core image is of an x86-64 thread, with all parts that CRIU needs.

    Raises:
        ImagesDamaged: a part is missing.
        ImagesUnsupported: another architecture, or an unknown task state.
    """
    if core.mtype != 1:
        names = {2: "arm", 3: "aarch64", 4: "ppc64", 5: "s390", 6: "mips", 7: "loongarch64"}
        raise ImagesUnsupported(
            f"{name}: a thread of architecture {names.get(core.mtype, core.mtype)}",
            "only x86-64 checkpoints can be restored",
        )
    if leader and not core.HasField("tc"):
        raise ImagesDamaged(f"{name}: no task state for a thread group leader", DUMP_AGAIN)
    if leader and core.tc.task_state not in set(TaskState):
        raise ImagesUnsupported(
            f"{name}: unknown task state {core.tc.task_state}", "dump with CRIU 3.17 to 4.2"
        )
    dead = leader and core.tc.task_state in (TaskState.DEAD, TaskState.ZOMBIE)
    if not dead and not (core.HasField("thread_info") and core.HasField("thread_core")):
        raise ImagesDamaged(f"{name}: no registers or no thread state", DUMP_AGAIN)


def check_memory(pid: int, memory: Memory, vmas: Vmas) -> None:
    """Check that every page lies in a private memory area.

    Raises:
        ImagesDamaged: one does not; CRIU fails on it too ("Page entry address outside of VMA").
    """
    private = vmas[is_private(vmas)]
    inside = covered(memory.entries, private["start"], private["end"])
    if not inside.all():
        stray = memory.entries[inside.argmin()]
        raise ImagesDamaged(
            f"{memory.name}: the {stray['size'] >> PAGE_SHIFT} pages at {stray['gva']:#x} are not"
            f" all in private memory areas of task {pid}",
            DUMP_AGAIN,
        )


def check_ids(ids: Iterable[int]) -> None:
    """Check that no id is listed twice, before the images of these ids are read.

    Raises:
        ImagesDamaged: a small file could cause the same images to be read a million times.
    """
    seen: set[int] = set()
    for tid in ids:
        if tid in seen:
            raise ImagesDamaged(f"pstree.img: thread id {tid} occurs twice", DUMP_AGAIN)
        seen.add(tid)


def check_tree(tasks: Sequence[Task]) -> None:
    """Check that the tasks form one tree and that no id is used twice.

    Raises:
        ImagesDamaged: they do not.
    """
    seen: set[int] = set()
    parents = {0}
    for task in tasks:
        if task.ppid not in parents:
            raise ImagesDamaged(
                f"pstree.img: parent {task.ppid} of task {task.pid} is not listed before it",
                DUMP_AGAIN,
            )
        parents.discard(0)  # there is one root; as in CRIU, parents come before their children
        parents.add(task.pid)
        for tid in task.threads:
            if not 0 < tid < 1 << 22:  # PID_MAX_LIMIT
                raise ImagesDamaged(f"pstree.img: impossible thread id {tid}", DUMP_AGAIN)
            if tid in seen:
                raise ImagesDamaged(f"pstree.img: thread id {tid} occurs twice", DUMP_AGAIN)
            seen.add(tid)
