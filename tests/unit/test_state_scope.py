"""Where state belongs: bindings in real images, their kernel objects, and the holds of a write."""

import itertools
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from ovr.attempt.journal import Journal
from ovr.attempt.settings import verify, write
from ovr.attempt.undo import Recording
from ovr.errors import AgentUntrusted, AttemptFailed, VerifyMismatch
from ovr.images import Draft, ImageSet, InsideImages, copy_of
from ovr.images.framing import encode, image_bytes
from ovr.images.objects import FileEntry, TtyInfoEntry
from ovr.kernel.linux.fdtable import close_on_exec, files_lookup_fd, set_close_on_exec
from ovr.state import KINDS, GuestTree, guest, scope
from ovr.state.settings import neutralise, take
from tests.unit.state_kernel import MiniKernel

# Of a container of rootless podman: ids 0 and 1 … 65536 are 1000 and 100000 … 165535.
USERNS = (
    "19435654064947552a0000000a07080010e80718010a0a080110a0"
    "8d06188080041207080010e8071801120a080110a08d0618808004"
)
BY_NAME = {kind.name: kind for kind in KINDS}


@pytest.fixture
def images(dumps):
    with ImageSet.open(dumps / "tree") as images:
        yield images


def labels(images, scope):
    return [binding.label for binding in scope.bindings(images)]


def test_places_of_a_tree(images):
    root, child, zombie = images.tasks
    alive = [f"pid {root.pid}", f"pid {child.pid}"]
    assert not zombie.alive
    for one_a_process in (scope.PROCESS, scope.MM, scope.MM_OWNER, scope.FS):
        assert labels(images, one_a_process) == alive
    assert labels(images, scope.THREAD) == [f"tid {t}" for t in (*root.threads, *child.threads)]
    assert labels(images, scope.DESCRIPTOR) == [
        f"fd {fd} of pid {pid}" for pid in (root.pid, child.pid) for fd in range(8)
    ]
    for nothing in (scope.UTS, scope.IPC, scope.TTY, scope.TIMERFD):
        assert labels(images, nothing) == []


def test_ids_in_a_user_namespace_are_left_to_criu(dumps, tmp_path):
    """CRIU dumps them as that namespace has them: in the kernel they are others."""
    copy = tmp_path / "images"
    shutil.copytree(dumps / "tree", copy)
    with ImageSet.open(copy) as images:
        assert labels(images, BY_NAME["loginuid"].scope) == labels(images, scope.PROCESS) != []
    (copy / "userns-9.img").write_bytes(bytes.fromhex(USERNS))
    with ImageSet.open(copy) as images:
        assert labels(images, BY_NAME["loginuid"].scope) == []
        assert labels(images, scope.PROCESS) != []


def test_a_file_has_one_place_however_many_have_it(images):
    """Both processes have all files; working directories and mapped files are not open."""
    root = images.tasks[0].pid
    assert labels(images, scope.REGULAR_FILE) == [
        f"file 5 (fd 1 of pid {root})",
        f"file 6 (fd 3 of pid {root})",
    ]
    assert labels(images, scope.EVENTFD) == [f"file 7 (fd 4 of pid {root})"]
    assert labels(images, scope.SIGNALFD) == [f"file 8 (fd 5 of pid {root})"]


def change(path, name, kind, edit, more=()):
    with ImageSet.open(path) as images:
        entries = [copy_of(entry) for entry in images.entries(name, kind)]
    edit(entries)
    (path / name).write_bytes(image_bytes(name, map(encode, [*entries, *more])))


def test_where_epoll_is_used_events_stay_inside(one):
    change(one, "files.img", FileEntry, lambda files: None, [FileEntry(type=7, id=999)])
    with ImageSet.open(one) as images:
        for watched in (scope.EVENTFD, scope.SIGNALFD, scope.TIMERFD):
            assert labels(images, watched) == []
        assert len(labels(images, scope.REGULAR_FILE)) == 2


def test_files_from_elsewhere_stay_inside(one):
    def edit(files):
        for file in files:
            if file.id == 6:
                file.reg.ext = True
            if file.id == 5:
                file.reg.mode = 0o040755

    change(one, "files.img", FileEntry, edit)
    with ImageSet.open(one) as images:
        assert labels(images, scope.REGULAR_FILE) == []


@pytest.mark.parametrize("master", [True, False])
def test_terminals_of_others_stay_inside(one, master):
    def info(number, rdev):
        info = TtyInfoEntry(
            id=number, type=1, locked=False, exclusive=False, packet_mode=False, sid=1, pgrp=1,
            rdev=rdev,
        )  # fmt: skip
        info.pty.index = 3
        return info

    def edit(files):
        for file, number in zip([f for f in files if f.id in (5, 6)], (1, 2), strict=True):
            fown = copy_of(file.reg.fown)
            file.ClearField("reg")
            file.type, file.tty.id, file.tty.tty_info_id, file.tty.flags = 11, file.id, number, 2
            file.tty.fown.CopyFrom(fown)

    change(one, "files.img", FileEntry, edit)
    infos = [info(1, 136 << 8 | 3), *([info(2, 5 << 8 | 2)] if master else [])]
    (one / "tty-info.img").write_bytes(image_bytes("tty-info.img", map(encode, infos)))
    with ImageSet.open(one) as images:
        assert len(labels(images, scope.TTY)) == (2 if master else 0)


def test_namespaces(dumps, tmp_path):
    with ImageSet.open(dumps / "uts") as images:
        (uts,) = scope.UTS.bindings(images)
        (ipc,) = scope.IPC.bindings(images)
        assert (uts.image, ipc.image) == ("utsns-10.img", "ipcns-var-9.img")
        namespace = SimpleNamespace()
        kernel = {"init_task": SimpleNamespace(nsproxy=SimpleNamespace(uts_ns=namespace))}
        task = SimpleNamespace(nsproxy=SimpleNamespace(uts_ns=namespace))
        tree = SimpleNamespace(kernel=kernel, task=lambda pid: task)
        with pytest.raises(AttemptFailed, match="of the VM itself"):
            uts.find(tree)
        task.nsproxy.uts_ns = SimpleNamespace(own=True)
        assert uts.find(tree) is task.nsproxy.uts_ns


def test_many_kinds_change_one_message(images):
    """Kinds that share an image do not undo each other, and what no kind touches stays."""
    kinds = [kind for kind in KINDS if kind.scope in (scope.THREAD, scope.PROCESS)]
    settings = take(images, kinds)
    draft, inside = Draft(images), InsideImages(images)
    neutralise(settings, draft)
    draft.apply_to(inside)
    changed = {name for name, data in inside.build().items() if data != original(images, name)}
    tids = {tid for task in images.tasks if task.alive for tid in task.threads}
    assert changed == {f"core-{tid}.img" for tid in tids}
    for setting in settings:
        left = setting.kind.take(
            draft.message(setting.binding.image, 0, type(setting.binding.message))
        )
        neutral = copy_of(setting.binding.message)
        setting.kind.neutralise(neutral)
        assert left == setting.kind.take(neutral)


def original(images, name):
    data = images.read(name)
    return data if len(data) <= 1 << 16 else InsideImages(images).build()[name]


class Recorder:
    """Stands in for the holder, and for a tree whose objects are dicts."""

    def __init__(self):
        self.held_now = False
        self.written = []
        self.holds = []

    @contextmanager
    def held(self):
        self.held_now, before = True, len(self.written)
        yield
        self.held_now = False
        self.holds.append(len(self.written) - before)


class Noted(type(BY_NAME["umask"])):
    def __init__(self, recorder):
        self.recorder = recorder

    def write(self, target, value):
        assert self.recorder.held_now
        self.recorder.written.append((target, value))

    def read(self, target):
        return dict(self.recorder.written).get(target)


def test_everything_is_found_and_written_in_short_holds(images, monkeypatch):
    recorder = Recorder()
    clock = itertools.count()
    monkeypatch.setattr("ovr.attempt.settings.time.perf_counter", lambda: next(clock) / 2048)
    fs = images.tasks[0].fs
    bindings = [
        scope.Binding(f"{n}", "", 0, fs, lambda tree, n=n: (tree, n)[1]) for n in range(100)
    ]
    kind = Noted(recorder)
    kind.__class__.scope = scope.Scope("many", lambda images: iter(bindings))
    settings = take(images, [kind])
    trees = []

    def tree():
        trees.append(recorder.held_now)

    kernel = SimpleNamespace(space=SimpleNamespace(recorder=None))
    write(settings, tree, recorder, Recording(Journal(), kernel, tree, recorder))
    assert recorder.written == [(n, 0o137) for n in range(100)]
    assert sum(recorder.holds) == 100
    assert recorder.holds == [21, 21, 21, 21, 16]  # of 10 ms
    assert trees == [False, *[True] * 5]  # once to rehearse, then anew in each hold
    verify(settings, None)
    recorder.written[7] = (7, 0)
    with pytest.raises(VerifyMismatch, match=r"^7: umask is 0 instead of 95$"):
        verify(settings, None)


def test_a_thread_that_is_not_stopped(monkeypatch):
    criu, gdb = SimpleNamespace(address_=7), SimpleNamespace(address_=8)
    tasks = {
        1: SimpleNamespace(traced=True, ptrace=1, parent=criu),
        2: SimpleNamespace(traced=False, ptrace=1, parent=criu),
        3: None,
        4: SimpleNamespace(traced=True, ptrace=1, parent=gdb),
        5: SimpleNamespace(traced=True, ptrace=0, parent=criu),
    }
    monkeypatch.setattr(guest, "find_task", lambda kernel, tid, namespace_of: tasks[tid])
    monkeypatch.setattr(guest, "is_traced", lambda task: task.traced)
    tree = GuestTree(None, None, 7)
    assert tree.task(1) is tasks[1]
    for tid in (4, 5):
        with pytest.raises(
            AgentUntrusted, match=f"thread {tid} ", check=lambda error: error.code == "tracer"
        ):
            tree.task(tid)
    for tid in (2, 3):
        with pytest.raises(AttemptFailed, match=f"thread {tid} "):
            tree.task(tid)


def test_files_by_descriptor(monkeypatch):
    mini = MiniKernel(new=True)
    files = mini.files(128)
    file, operations = mini.make("struct file"), mini.make("struct file_operations")
    files.fdt.fd[100] = file
    file.f_op = operations
    assert files_lookup_fd(files, 100) == file
    for fd in (0, 127, 128, 1 << 40, -1):
        assert not files_lookup_fd(files, fd)
    set_close_on_exec(files, 100, True)
    assert [fd for fd in range(128) if close_on_exec(files, fd)] == [100]
    symbols = {"these": operations.address_, "those": 1}
    tree = GuestTree(SimpleNamespace(symbol=symbols.get), None, 0)
    monkeypatch.setattr(tree, "task", lambda pid: SimpleNamespace(files=files))
    assert tree.file(1, 100) == tree.file(1, 100, "these") == file
    for wrong in ((1, 100, "those"), (1, 99)):
        with pytest.raises(AttemptFailed, match="of pid 1 is not open, or another kind"):
            tree.file(*wrong)
