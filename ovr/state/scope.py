"""Find the objects that have state: tasks, threads, memory descriptors, open files, namespaces.

A `Scope` finds the objects of one sort in the images. Each is a `Binding` of an image message to a
kernel object, which it finds in the guest. A kind of state only handles these two.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Final, NamedTuple

from ovr.errors import AttemptFailed
from ovr.images import ImageSet, Task
from ovr.images.objects import FdinfoEntry, FileEntry, IpcVarEntry, TtyInfoEntry, UtsnsEntry
from ovr.images.wire import Message
from ovr.kernel import Kernel, Struct, for_each_process, for_each_thread
from ovr.state.guest import GuestTree

__all__ = [
    "DESCRIPTOR",
    "EVENTFD",
    "FS",
    "IPC",
    "MM",
    "MM_OWNER",
    "PROCESS",
    "PROCESS_OF_THE_VM",
    "REGULAR_FILE",
    "SIGNALFD",
    "THREAD",
    "TIMERFD",
    "TTY",
    "UTS",
    "Binding",
    "Descriptor",
    "Scope",
    "Users",
]

_EVENTPOLL: Final = 7  # enum fd_types in CRIU's images/fdinfo.proto
_S_IFMT: Final = 0o170000
_S_IFREG: Final = 0o100000
_PTMX: Final = 5 << 8 | 2  # makedev(5, 2), old encoding as in st_rdev


Users = Callable[[Kernel], Iterator[Any]]


@dataclass(frozen=True)
class Binding:
    """One object: its message in the images, and how to find it in the guest.

    Attributes:
        label: its name in messages, such as ``pid 12``.
        image: file name of the image that describes it.
        index: index of its entry there.
        message: the entry; shared with the image set, not to be changed.
        find: returns the kernel object in the guest. Raises `AttemptFailed`, `GuestFault`.
    """

    label: str
    image: str
    index: int
    message: Message
    find: Callable[[GuestTree], Any]


@dataclass(frozen=True)
class Scope:
    """One sort of object that has state.

    Attributes:
        name: its name.
        bindings: yields the bindings of an image set.
        users: yields the objects of this sort that any task of the guest uses; for objects that may
            outlive the tree. None if killing the tree ends the object.
    """

    name: str
    bindings: Callable[[ImageSet], Iterator[Binding]]
    users: Users | None = None


class Descriptor(NamedTuple):
    """A descriptor in a ``struct files_struct``."""

    files: Struct
    fd: int


def _alive(images: ImageSet) -> list[Task]:
    return [task for task in images.tasks if task.alive]


def _processes(images: ImageSet) -> Iterator[Binding]:
    for task in _alive(images):
        yield _of_task(task, f"core-{task.pid}.img", task.core, lambda leader: leader)


def _processes_of_the_vm(images: ImageSet) -> Iterator[Binding]:
    # A tree dumped with its own user namespace has the ids of that namespace (userns_uid()).
    if not any(name.startswith("userns-") for name in images.names):
        yield from _processes(images)


def _fs(images: ImageSet) -> Iterator[Binding]:
    for task in _alive(images):
        if task.fs is not None:
            yield _of_task(task, f"fs-{task.pid}.img", task.fs, lambda leader: leader.fs)


def _mms(images: ImageSet) -> Iterator[Binding]:
    for task in _alive(images):
        assert task.mm is not None
        yield _of_task(task, f"mm-{task.pid}.img", task.mm, lambda leader: leader.mm)


def _mm_owners(images: ImageSet) -> Iterator[Binding]:
    for task in _alive(images):
        assert task.mm is not None
        yield _of_task(task, f"mm-{task.pid}.img", task.mm, lambda leader: leader)


def _of_task(task: Task, image: str, message: Message, part: Callable[[Any], Any]) -> Binding:
    label = f"pid {task.pid}"
    return Binding(label, image, 0, message, lambda guest: part(guest.task(task.pid)))


def _threads(images: ImageSet) -> Iterator[Binding]:
    for task in _alive(images):
        for tid in task.threads:
            image, message = f"core-{tid}.img", task.cores[tid]
            yield Binding(f"tid {tid}", image, 0, message, methodcaller("task", tid))


def _fdinfos(images: ImageSet) -> Iterator[tuple[Task, str, int, FdinfoEntry]]:
    # Yields each descriptor once, with one of its tasks.
    seen = set()
    for task in _alive(images):
        image = f"fdinfo-{images.ids(task).files_id}.img"
        if image not in seen:
            seen.add(image)
            for index, entry in enumerate(images.entries(image, FdinfoEntry)):
                yield task, image, index, entry


def _descriptors(images: ImageSet) -> Iterator[Binding]:
    for task, image, index, entry in _fdinfos(images):
        label = f"fd {entry.fd} of pid {task.pid}"
        yield Binding(label, image, index, entry, _descriptor_finder(task.pid, entry.fd))


def _descriptor_finder(pid: int, fd: int) -> Callable[[GuestTree], Descriptor]:
    def find(guest: GuestTree) -> Descriptor:
        guest.file(pid, fd)  # raises unless it is open
        return Descriptor(guest.task(pid).files, fd)

    return find


def _openings(images: ImageSet) -> Mapping[int, tuple[int, int]]:
    # A pid and a descriptor for each open file, by its id in files.img.
    found: dict[int, tuple[int, int]] = {}
    for task, _, _, entry in _fdinfos(images):
        found.setdefault(entry.id, (task.pid, entry.fd))
    return found


def _files(images: ImageSet, field: str) -> Iterator[tuple[int, FileEntry, int, int]]:
    # Yields each open file with that field once, with one of its descriptors.
    openings = _openings(images)
    for index, entry in enumerate(images.entries("files.img", FileEntry)):
        if entry.HasField(field) and entry.id in openings:
            yield index, entry, *openings[entry.id]


def _regular_files(images: ImageSet) -> Iterator[Binding]:
    for index, entry, pid, fd in _files(images, "reg"):
        if entry.reg.mode & _S_IFMT == _S_IFREG and not entry.reg.ext:
            label = f"file {entry.id} (fd {fd} of pid {pid})"
            yield Binding(label, "files.img", index, entry, _regular_finder(pid, fd))


def _regular_finder(pid: int, fd: int) -> Callable[[GuestTree], Any]:
    def find(guest: GuestTree) -> Any:
        file = guest.file(pid, fd)
        if file.f_inode.i_mode & _S_IFMT != _S_IFREG:
            raise AttemptFailed(
                f"fd {fd} of pid {pid} is not a regular file in the guest",
                "give the guest the file system that the process was dumped with",
            )
        return file

    return find


def _context_files(field: str, operations: str, context: str) -> Scope:
    """Return the scope of files of one sort, as the context in ``file->private_data``.

    It is empty if the tree has an epoll instance, which gets events only by wake-ups; a write from
    outside causes none.
    """

    def bindings(images: ImageSet) -> Iterator[Binding]:
        if any(entry.type == _EVENTPOLL for entry in images.entries("files.img", FileEntry)):
            return
        for index, entry, pid, fd in _files(images, field):
            label = f"file {entry.id} (fd {fd} of pid {pid})"
            yield Binding(label, "files.img", index, entry, finder(pid, fd))

    def finder(pid: int, fd: int) -> Callable[[GuestTree], Any]:
        return lambda guest: guest.file(pid, fd, operations).private_data.cast_(context)

    return Scope(context.removeprefix("struct ").removesuffix("_ctx"), bindings)


def _ttys(images: ImageSet) -> Iterator[Binding]:
    # Pseudo terminals whose master is in the images too: only tasks of the tree have them open.
    openings = {
        entry.tty.tty_info_id: (pid, fd) for _, entry, pid, fd in _files(images, "tty")
    }  # fmt: skip
    infos = images.entries("tty-info.img", TtyInfoEntry)
    own = {info.pty.index for info in infos if info.HasField("pty") and info.rdev == _PTMX}
    for index, info in enumerate(infos):
        if info.HasField("pty") and info.pty.index in own and info.id in openings:
            pid, fd = openings[info.id]
            label = f"terminal {info.id} (fd {fd} of pid {pid})"
            yield Binding(label, "tty-info.img", index, info, _tty_finder(pid, fd))


def _tty_finder(pid: int, fd: int) -> Callable[[GuestTree], Any]:
    def find(guest: GuestTree) -> Any:
        file = guest.file(pid, fd)
        private = file.private_data.cast_("struct tty_file_private")
        if private.file != file:
            raise AttemptFailed(f"fd {fd} of pid {pid} is not a terminal in the guest")
        return private.tty

    return find


def _namespaces(
    images: ImageSet, field: str, image: str, message: type[Message]
) -> Iterator[tuple[str, Message, int, int]]:
    # The namespaces of that sort that have images, that is, were dumped with the tree.
    seen = set()
    for task in _alive(images):
        number = getattr(images.ids(task), f"{field}_id")
        entries = images.entries(f"{image}-{number}.img", message)
        if number not in seen and entries:
            seen.add(number)
            yield f"{image}-{number}.img", entries[0], number, task.pid


def _namespace_finder(pid: int, field: str) -> Callable[[GuestTree], Any]:
    def find(guest: GuestTree) -> Any:
        namespace = getattr(guest.task(pid).nsproxy, field)
        if namespace == getattr(guest.kernel["init_task"].nsproxy, field):
            raise AttemptFailed(
                f"pid {pid} runs in the {field} of the VM itself, unlike in the images",
                "restore it into a namespace of its own",
            )
        return namespace

    return find


def _namespaces_in_use(field: str) -> Users:
    def users(kernel: Kernel) -> Iterator[Any]:
        for process in for_each_process(kernel):
            for thread in for_each_thread(process):
                if proxy := thread.nsproxy:  # a zombie has none
                    yield getattr(proxy, field)

    return users


def _uts(images: ImageSet) -> Iterator[Binding]:
    for image, entry, number, pid in _namespaces(images, "uts_ns", "utsns", UtsnsEntry):
        yield Binding(f"UTS namespace {number}", image, 0, entry, _namespace_finder(pid, "uts_ns"))


def _ipc(images: ImageSet) -> Iterator[Binding]:
    # CRIU creates the namespace's objects under its limits, which stay inside if there are any.
    for image, entry, number, pid in _namespaces(images, "ipc_ns", "ipcns-var", IpcVarEntry):
        objects = {f"ipcns-{sort}-{number}.img" for sort in ("msg", "sem", "shm")}
        if not objects & {*images.names}:
            find = _namespace_finder(pid, "ipc_ns")
            yield Binding(f"IPC namespace {number}", image, 0, entry, find)


PROCESS: Final = Scope("process", _processes)
"""`CoreEntry` of the leader; the leader's ``task_struct``."""

PROCESS_OF_THE_VM: Final = Scope("process", _processes_of_the_vm)
"""The same for trees without a user namespace of their own, whose ids are those of the VM."""

THREAD: Final = Scope("thread", _threads)
"""`CoreEntry`; ``task_struct``."""

FS: Final = Scope("fs", _fs)
"""`FsEntry`; ``fs_struct``."""

MM: Final = Scope("mm", _mms)
"""`MmEntry`; ``mm_struct``."""

MM_OWNER: Final = Scope("mm owner", _mm_owners)
"""`MmEntry`; the leader's ``task_struct``."""

DESCRIPTOR: Final = Scope("descriptor", _descriptors)
"""`FdinfoEntry`; `Descriptor`."""

REGULAR_FILE: Final = Scope("regular file", _regular_files)
"""`FileEntry`; ``struct file``."""

EVENTFD: Final = _context_files("efd", "eventfd_fops", "struct eventfd_ctx")
"""`FileEntry`; ``eventfd_ctx``."""

SIGNALFD: Final = _context_files("sgfd", "signalfd_fops", "struct signalfd_ctx")
"""`FileEntry`; ``signalfd_ctx``."""

TIMERFD: Final = _context_files("tfd", "timerfd_fops", "struct timerfd_ctx")
"""`FileEntry`; ``timerfd_ctx``."""

TTY: Final = Scope("terminal", _ttys)
"""`TtyInfoEntry`; ``tty_struct``."""

UTS: Final = Scope("UTS namespace", _uts, _namespaces_in_use("uts_ns"))
"""`UtsnsEntry`; ``uts_namespace``."""

IPC: Final = Scope("IPC namespace", _ipc, _namespaces_in_use("ipc_ns"))
"""`IpcVarEntry`; ``ipc_namespace``."""
