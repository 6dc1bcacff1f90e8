"""Plan a dump: what the host would read, and what the guest's CRIU would write for which reason.

CRIU decides by area which pages it dumps, and whether it looks for them in the parent image set
(``generate_vma_iovs`` in criu/mem.c): it writes those that it does not look for, although the host
reads them as well. The plan makes the same decisions from the guest kernel's own structures. It
only reads them, and stops nothing: the tree changes meanwhile.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Final

import numpy as np

from ovr._fastcopy import OWNED
from ovr.errors import UsageError
from ovr.kernel import (
    VM_HUGETLB,
    VM_IO,
    VM_PFNMAP,
    Array,
    Kernel,
    Struct,
    container_of,
    for_each_thread,
    for_each_vma,
    is_kernel_thread,
    mm_space,
    settled,
    task_comm,
    tree_of,
    types_that_fit,
)
from ovr.kernel.linux.mm import VM_READ
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.extents import split
from ovr.memory.paging import AddressSpace, Frames, pieces

__all__ = [
    "Area",
    "DumpPlan",
    "Mapping",
    "Reason",
    "SharedPlan",
    "TaskPlan",
    "judge",
    "plan_dump",
    "tree_to_dump",
]

VM_MAYSHARE: Final = 0x80
"""include/linux/mm.h: a shared mapping, even if it may not be written to."""

AIO_RING_MAGIC: Final = 0xA10A_10A1
TMPFS_MAGIC: Final = 0x0102_1994
HUGETLBFS_MAGIC: Final = 0x9584_58F6
"""include/uapi/linux/magic.h, fs/aio.c: ``s_magic`` of file systems."""
SB_KERNMOUNT: Final = 1 << 22
"""include/linux/fs.h: a file system that the kernel has mounted for itself."""

_SEALED: Final = 0x8 | 0x10
"""include/uapi/linux/fcntl.h: F_SEAL_WRITE, F_SEAL_FUTURE_WRITE."""
_INODES: Final = {
    TMPFS_MAGIC: "struct shmem_inode_info",
    HUGETLBFS_MAGIC: "struct hugetlbfs_inode_info",
}

_PAGE_ANON: Final = 1  # PAGE_MAPPING_ANON, of pages of KSM too
_USER_END: Final = (1 << 47) - PAGE_SIZE
"""``kdat.task_size`` of CRIU on x86-64: it does not dump the content of areas that end above."""
_MM_SWAPENTS: Final = 2  # include/linux/mm_types_task.h
_SECTOR: Final = 512  # unit of i_blocks
_SLICE: Final = 4 << 30
"""Bytes of addresses in one walk, since page tables may claim that all of them are mapped."""


class Reason(IntEnum):
    """How pages get into the images, and why."""

    OUTSIDE = 0
    SHARED = 1
    HUGETLB = 2
    UNREADABLE = 3
    AIO_RING = 4
    SEALED = 5
    HIGH = 6

    @property
    def text(self) -> str:
        """The reason as a line of text."""
        return _TEXTS[self]

    @property
    def where(self) -> str:
        """``outside``, ``inside``, or ``lost``: in no image."""
        return {Reason.SEALED: "inside", Reason.HIGH: "lost"}.get(self, "outside")

    @property
    def twice(self) -> bool:
        """Whether CRIU writes the pages in the guest, although they are read outside."""
        return self in (Reason.SHARED, Reason.HUGETLB, Reason.UNREADABLE, Reason.AIO_RING)


_TEXTS: Final = {
    Reason.OUTSIDE: "read from outside",
    Reason.SHARED: "shared memory, which CRIU always writes, too",
    Reason.HUGETLB: "private hugetlb pages, which CRIU always writes, too",
    Reason.UNREADABLE: "pages that the task may not read, which CRIU always writes, too",
    Reason.AIO_RING: "AIO ring, which CRIU always writes, too",
    Reason.SEALED: "a memfd that is sealed against writing: written by CRIU",
    Reason.HIGH: "areas above 47 bits: CRIU does not dump their content, they become zeros",
}


@dataclass(frozen=True)
class Area:
    """A VMA with pages that are dumped; half-open, in bytes.

    Attributes:
        size: bytes of its pages that are dumped.
        reason: the verdict on them.
    """

    start: int
    end: int
    size: int
    reason: Reason


@dataclass(frozen=True)
class TaskPlan:
    """The plan for the pages of one task; zombies have none.

    Attributes:
        pid: its pid in the guest's initial pid namespace.
        comm: its name.
        threads: ids of its threads, itself included.
        areas: its areas with private pages.
        swapped: bytes in swap, which are not in `areas`; the kernel counts them approximately.
    """

    pid: int
    comm: str
    threads: tuple[int, ...]
    areas: tuple[Area, ...] = ()
    swapped: int = 0

    def by_reason(self) -> dict[Reason, int]:
        """Return the bytes of each verdict."""
        found: dict[Reason, int] = {}
        for area in self.areas:
            found[area.reason] = found.get(area.reason, 0) + area.size
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class SharedPlan:
    """A shared memory object that the tree has mapped.

    Attributes:
        size: bytes of its pages, those in swap too.
        pids: the tasks that map it, as in `TaskPlan`.
        reason: the verdict on it.
    """

    size: int
    pids: tuple[int, ...]
    reason: Reason


@dataclass(frozen=True)
class DumpPlan:
    """The plan for a tree; bytes are page bytes, as in `ovr.dump.report.DumpReport`.

    Memfds that no task has mapped are not known.
    """

    tasks: tuple[TaskPlan, ...]
    shared: tuple[SharedPlan, ...]

    @property
    def bytes_outside(self) -> int:
        """Bytes that are read from outside."""
        return sum(size for reason, size in self.by_reason().items() if reason.where == "outside")

    @property
    def bytes_inside(self) -> int:
        """Bytes that CRIU writes and the agent sends."""
        return sum(size for reason, size in self.by_reason().items() if reason.where == "inside")

    @property
    def bytes_total(self) -> int:
        """Bytes of all pages in the images."""
        return self.bytes_outside + self.bytes_inside

    @property
    def bytes_written_twice(self) -> int:
        """Bytes that are read from outside, and written by CRIU as well."""
        return sum(size for reason, size in self.by_reason().items() if reason.twice)

    def by_reason(self) -> dict[Reason, int]:
        """Return the bytes of each verdict, of all tasks and of shared memory."""
        found: dict[Reason, int] = {}
        pages = [(area.reason, area.size) for task in self.tasks for area in task.areas]
        pages += [(one.reason, one.size) for one in self.shared]
        for reason, size in pages:
            found[reason] = found.get(reason, 0) + size
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Mapping:
    """A VMA, as far as the decision needs it.

    Attributes:
        flags: ``vm_flags``.
        file: whether a file is mapped.
        anonymous: whether its pages are anonymous from the start (``vma_is_anonymous()``).
        magic: ``s_magic`` of the file's file system.
        memory: whether the file is in the kernel's own tmpfs or hugetlbfs: anonymous shared
            memory, a SysV segment, or a memfd.
        sealed: whether such a file is sealed against writing.
        inode: GVA of the file's inode.
        size: bytes of such a file.
    """

    start: int
    end: int
    flags: int
    file: bool = False
    anonymous: bool = False
    magic: int = 0
    memory: bool = False
    sealed: bool = False
    inode: int = 0
    size: int = 0

    @property
    def special(self) -> bool:
        """Whether it is the vDSO, which CRIU always dumps as a whole."""
        return not (self.file or self.anonymous)


def judge(one: Mapping) -> Reason | None:
    """Return the verdict on the private pages of a mapping; None if CRIU dumps none of them.

    ``vma_area_is_private``, ``should_dump_page`` and ``generate_vma_iovs`` of CRIU.
    """
    if one.magic == AIO_RING_MAGIC:
        return Reason.AIO_RING
    if one.flags & (VM_MAYSHARE | VM_IO | VM_PFNMAP):
        return None
    if one.end > _USER_END:
        return Reason.HIGH
    if one.flags & VM_HUGETLB:
        return Reason.HUGETLB
    return Reason.OUTSIDE if one.flags & VM_READ else Reason.UNREADABLE


@dataclass
class _Shared:
    size: int
    sealed: bool
    pids: list[int] = field(default_factory=list)


@types_that_fit()
def tree_to_dump(kernel: Kernel, pid: int) -> list[tuple[int, Struct]]:
    """Return the tasks of a tree as `tree_of` does.

    Args:
        kernel: the guest's kernel.
        pid: the root task, in the guest's initial pid namespace.

    Raises:
        UsageError: there is no such process, or it is a kernel thread.
        GuestFault: invalid kernel objects in the guest, each time they are read.
    """
    found = tree_of(kernel, pid)
    if not found:
        raise UsageError(f"the guest has no process {pid}", "ovr ps shows its processes")
    if is_kernel_thread(found[0][1]):
        raise UsageError(f"pid {pid} is a kernel thread", "ovr ps shows these in brackets")
    return found


@types_that_fit()
def plan_dump(kernel: Kernel, pid: int) -> DumpPlan:
    """Decide for every page of a running tree.

    Args:
        kernel: the guest's kernel; it is only read.
        pid: the root task, in the guest's initial pid namespace.

    Raises:
        UsageError: there is no such process, or it is a kernel thread.
        GuestFault: invalid kernel objects in the guest, each time they are read.
        KernelNotFound: invalid types of its kernel.
    """
    shared: dict[int, _Shared] = {}
    tasks = [_plan_task(kernel, task, shared) for _, task in tree_to_dump(kernel, pid)]
    objects = [
        SharedPlan(one.size, tuple(one.pids), Reason.SEALED if one.sealed else Reason.SHARED)
        for one in shared.values()
    ]
    return DumpPlan(tuple(tasks), tuple(objects))


def _plan_task(kernel: Kernel, task: Struct, shared: dict[int, _Shared]) -> TaskPlan:
    pid, comm = task.tgid, task_comm(task)
    threads = settled(lambda: tuple(thread.pid for thread in for_each_thread(task)))
    mm = task.mm
    if not mm:
        return TaskPlan(pid, comm, threads)
    private: list[tuple[Mapping, Reason]] = []
    for one in settled(lambda: [_describe(vma) for vma in for_each_vma(mm)]):
        if one.size:  # of a memfd that is mapped privately, too
            users = shared.setdefault(one.inode, _Shared(one.size, one.sealed)).pids
            if pid not in users:
                users.append(pid)
        if (reason := judge(one)) is not None:
            private.append((one, reason))
    # CRIU dumps pages of KSM, and those under writeback, like all others.
    anonymous = replace(
        kernel.anonymous_frames, folio_mask=0, folio_value=0, mapping_mask=_PAGE_ANON,
        mapping_value=_PAGE_ANON,
    )  # fmt: skip
    sizes = _sizes(mm_space(kernel, mm), anonymous, [one for one, _ in private])
    areas = tuple(
        Area(one.start, one.end, size, reason)
        for (one, reason), size in zip(private, sizes, strict=True)
        if size
    )
    return TaskPlan(pid, comm, threads, areas, _swapped(mm))


def _describe(vma: Struct) -> Mapping:
    start, end, flags = vma.vm_start, vma.vm_end, vma.vm_flags
    if not vma.vm_file:
        return Mapping(start, end, flags, anonymous=not vma.vm_ops)
    inode = vma.vm_file.f_inode
    magic, mounted = inode.i_sb.s_magic, inode.i_sb.s_flags
    memory = magic in (TMPFS_MAGIC, HUGETLBFS_MAGIC) and bool(mounted & SB_KERNMOUNT)
    if not memory:
        return Mapping(start, end, flags, file=True, magic=magic)
    seals = container_of(inode, _INODES[magic], "vfs_inode").seals
    return Mapping(
        start, end, flags, file=True, magic=magic, memory=True, sealed=bool(seals & _SEALED),
        inode=inode.address_, size=inode.i_blocks * _SECTOR,
    )  # fmt: skip


def _sizes(space: AddressSpace, anonymous: Frames, areas: Sequence[Mapping]) -> list[int]:
    # The bytes that CRIU dumps of each area: its anonymous pages, neither those of a file nor the
    # page of zeros.
    whole = [one.special or one.magic == AIO_RING_MAGIC for one in areas]
    found = np.array(
        [one.end - one.start if all_ else 0 for one, all_ in zip(areas, whole, strict=True)],
        dtype=np.uint64,
    )
    walked = [n for n, all_ in enumerate(whole) if not all_]
    starts = np.array([areas[n].start for n in walked], dtype=np.uint64)
    places = np.array(walked, dtype=np.intp)
    wanted = pieces((areas[n].start, areas[n].end - areas[n].start, 0) for n in walked)
    for part in split(wanted, _SLICE):
        runs = space.walk(part, anonymous)
        runs = runs[runs["flags"] & OWNED != 0]
        owner = np.searchsorted(starts, runs["gva"], side="right") - 1
        np.add.at(found, places[owner], runs["size"])
    return [int(size) for size in found.tolist()]


def _swapped(mm: Struct) -> int:
    stat = mm.rss_stat
    if isinstance(stat, Array):
        # Linux kernel commit f1a7941243c1 ("mm: convert mm's rss stats into percpu_counter")
        # (in v6.2): the part of each CPU is left out.
        pages = stat[_MM_SWAPENTS].count
    else:
        pages = stat.count[_MM_SWAPENTS].counter
    return max(int(pages), 0) * PAGE_SIZE
