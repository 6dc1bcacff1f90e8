"""Kinds of state, one by one: what real images say, and what lands in a kernel's objects."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ovr.attempt.settings import verify
from ovr.errors import AttemptFailed, ImagesDamaged, KernelNotFound
from ovr.images import CoreEntry, FsEntry, ImageSet, MmEntry, copy_of
from ovr.images.objects import FileEntry, IpcVarEntry, TtyInfoEntry, UtsnsEntry
from ovr.kernel import DoesNotFit, address_of, for_each_thread
from ovr.state import INSIDE_KINDS, KINDS
from ovr.state.kinds.signals import NEVER_BLOCKED
from ovr.state.scope import Descriptor
from tests.unit.state_kernel import MiniKernel

BY_NAME = {kind.name: kind for kind in KINDS}
ONES = (1 << 64) - 1
ACTIONS = tuple((0x40_0000 + n, 0x0400_0004, 0x50_0000, 1 << n) for n in range(62))
LIMITS = tuple((10 + n, 20 + n) for n in range(15))
CAPS = (0x21, 0x1FF_FFFF_FFFF, 0x1FE_0000_0001, 0x1FF_0000_0000, 0x20)
IPC = {
    "sem_ctls": (1, 2, 3, 4), "msg_ctlmax": 5, "msg_ctlmnb": 6, "msg_ctlmni": 7,
    "shm_ctlmax": 1 << 60, "shm_ctlall": 1 << 61, "shm_ctlmni": 8, "shm_rmid_forced": 1,
    "mq_queues_max": 9, "mq_msg_max": 10, "mq_msgsize_max": 11, "mq_msg_default": 12,
    "mq_msgsize_default": 13,
}  # fmt: skip

# The type of object that a kind of state is written to, and possible values.
VALUES = {
    "alternate_signal_stack": ("task", [(0x7000, 8192, 0), (0, 0, 2), (0x7000, 8192, 1 << 31)]),
    "arguments": ("mm", [(1, 2, 3, 4)]),
    "auxv": ("mm", [(), (33, 1 << 47, 6, 4096), (1,) * 46]),
    "blocked_signals": ("task", [0, ONES & ~NEVER_BLOCKED]),
    "brk": ("mm", [(0x1000, 0x2345)]),
    "capabilities": ("task", [(0,) * 5, CAPS]),
    "child_subreaper": ("task", [True, False]),
    "clear_child_tid": ("task", [0, 0x7FFF_1234_5678]),
    "close_on_exec": ("descriptor", [True, False]),
    "code_bounds": ("mm", [(1, 2, 3, 4, 5)]),
    "comm": ("task", ["", "a name", "\udcff", "fifteen letters"]),
    "domainname": ("uts_namespace", ["", "x" * 64]),
    "dumpable": ("task", [0, 1, 2]),
    "eventfd_counter": ("eventfd_ctx", [0, ONES - 1]),
    "file_position": ("file", [0, 1 << 62]),
    "ipc_limits": ("ipc_namespace", [IPC]),
    "loginuid": ("task", [0, 1000, (1 << 32) - 1]),
    "no_new_privs": ("task", [True, False]),
    "nodename": ("uts_namespace", ["host", "\udcff"]),
    "oom_score_adj": ("task", [-1000, 0, 1000]),
    "pdeath_signal": ("task", [0, 64]),
    "personality": ("task", [0, 0x0600_0000]),
    "rlimits": ("task", [LIMITS, ((ONES, ONES),) * 15]),
    "robust_list": ("task", [0, 0x7FFF_1234_5678]),
    "securebits": ("task", [0, 0xFF]),
    "signal_actions": ("task", [ACTIONS, ((0, 0, 0, 0),) * 62]),
    "signalfd_mask": ("signalfd_ctx", [0, ONES & ~NEVER_BLOCKED]),
    "timerfd_ticks": ("timerfd_ctx", [0, 7]),
    "umask": ("fs_struct", [0, 0o137]),
    "window_size": ("tty_struct", [(0, 0, 0, 0), (24, 80, 0, 65535)]),
}


@pytest.fixture(params=[True, False], ids=["new", "old"])
def kernel(request) -> MiniKernel:
    return MiniKernel(new=request.param)


def target_for(kernel: MiniKernel, sort: str):
    if sort == "task":
        return kernel.process(threads=3, parent=kernel.process())
    if sort == "descriptor":
        return Descriptor(kernel.files(), 70)
    return kernel.make("struct mm_struct" if sort == "mm" else f"struct {sort}")


def test_there_is_a_value_for_every_kind():
    assert set(VALUES) == set(BY_NAME)


@pytest.mark.parametrize("name", VALUES)
def test_written_is_read(kernel, name):
    sort, values = VALUES[name]
    target = target_for(kernel, sort)
    for value in values:
        BY_NAME[name].write(target, value)
        assert BY_NAME[name].read(target) == value


@pytest.mark.parametrize("name", VALUES)
def test_neighbours_stay(kernel, name):
    """All bits around what is written are ones, and stay so."""
    sort, values = VALUES[name]
    target = target_for(kernel, sort)
    if sort in ("task", "descriptor"):
        pytest.skip("objects with pointers")
    start, size = target.address_ - kernel.memory.base, target.size_
    kernel.memory.data[start - 8 : start + size + 8] = b"\xff" * (size + 16)
    BY_NAME[name].write(target, values[-1])
    assert BY_NAME[name].read(target) == values[-1]
    assert kernel.memory.data[start - 8 : start] == b"\xff" * 8
    assert kernel.memory.data[start + size : start + size + 8] == b"\xff" * 8


def test_the_safety_of_every_kind_is_documented():
    said = (Path(__file__).parents[2] / "docs" / "safety.md").read_text()
    assert [kind.name for kind in KINDS if f"`{kind.name}`" not in said] == []


def test_every_kind_is_explained():
    names = [kind.name for kind in KINDS] + [kind.name for kind in INSIDE_KINDS]
    assert len({*names}) == len(names)
    for kind in KINDS:
        assert kind.summary
        assert kind.source
        assert kind.groups
        assert not {*kind.groups} & {*names, "all"}
    assert all(kind.reason for kind in INSIDE_KINDS)


# Content of real images.


@pytest.fixture
def images(dumps):
    with ImageSet.open(dumps / "uts") as images:
        yield images


def messages(images: ImageSet, name: str):
    return [binding.message for binding in BY_NAME[name].scope.bindings(images)]


@pytest.mark.parametrize("name", sorted(VALUES))
def test_neutral_is_another_value(images, name):
    """None of the dumps has the neutral value, but where it is the common one."""
    common = {"oom_score_adj", "personality", "loginuid", "child_subreaper", "securebits"}
    common |= {"alternate_signal_stack", "ipc_limits", "blocked_signals", "close_on_exec"}
    kind = BY_NAME[name]
    for message in messages(images, name):
        value = kind.take(message)
        if value is None:
            continue
        neutral = copy_of(message)
        kind.neutralise(neutral)
        assert neutral.IsInitialized()
        left = kind.take(neutral)
        assert left != value or name in common


def test_what_the_sample_set(images):
    """The values of tests/unit/images/data/sample.c."""

    def of(name):
        return [BY_NAME[name].take(message) for message in messages(images, name)]

    assert of("umask") == [0o137]
    assert of("comm") == ["sample", "first", "second"]
    assert 1234 in of("file_position")
    assert of("eventfd_counter") == [4242]
    assert of("signalfd_mask") == [1 << 14]
    assert of("close_on_exec") == [None] * 6 + [True] * 2
    (limits,) = of("ipc_limits")
    assert limits["sem_ctls"] == (32000, 1024000000, 500, 32000)
    (actions,) = of("signal_actions")
    assert len(actions) == 62
    (limits,) = of("rlimits")
    assert len(limits) == 15


# Content of hostile or unusual images.


@pytest.mark.parametrize(
    ("dumped", "meant"),
    [(0, 0), (8, 8), (6_000_000, 0x0600_0000), (40_000, 0x4_0000), (8_000_008, 0x0800_0008),
     (0x0040_0000, 0x0040_0000)],
)  # fmt: skip
def test_personality_is_read_as_criu_writes_it(dumped, meant):
    core = CoreEntry()
    core.tc.personality = dumped
    assert BY_NAME["personality"].take(core) == meant


def core_entry() -> CoreEntry:
    core = CoreEntry()
    creds = core.thread_core.creds
    for words in (creds.cap_inh, creds.cap_prm, creds.cap_eff, creds.cap_bnd):
        words.extend([0, 0])
    for _ in range(62):
        core.tc.sigactions.add(sigaction=0, flags=0, restorer=0, mask=0)
    for _ in range(16):
        core.tc.rlimits.rlimits.add(cur=1, max=2)
    return core


def damaged(change):
    core = core_entry()
    change(core)
    return core


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("personality", damaged(lambda core: setattr(core.tc, "personality", 1 << 31))),
        ("oom_score_adj", damaged(lambda core: setattr(core.tc, "oom_score_adj", 1001))),
        ("pdeath_signal", damaged(lambda core: setattr(core.thread_core, "pdeath_sig", 65))),
        ("rlimits", damaged(lambda core: setattr(core.tc.rlimits.rlimits[7], "cur", 3))),
        ("signal_actions", damaged(lambda core: core.tc.sigactions.__delitem__(0))),
        ("capabilities", damaged(lambda c: c.thread_core.creds.cap_eff.__setitem__(0, 1))),
        ("capabilities", damaged(lambda c: c.thread_core.creds.cap_amb.append(1))),
        ("brk", MmEntry(mm_start_brk=2, mm_brk=1)),
        ("arguments", MmEntry(mm_arg_start=2, mm_arg_end=1)),
        ("code_bounds", MmEntry(mm_start_stack=1 << 63)),
        ("dumpable", MmEntry(dumpable=3)),
        ("nodename", UtsnsEntry(nodename=b"x" * 65)),
        ("domainname", UtsnsEntry(domainname=b"a\0b")),
    ],
)
def test_impossible_values(name, message):
    with pytest.raises(ImagesDamaged) as caught:
        BY_NAME[name].take(message)
    assert caught.value.hint


def test_signals_that_cannot_be_blocked_are_not():
    core = core_entry()
    core.thread_core.blk_sigset = ONES
    core.tc.sigactions[0].mask = core.tc.sigactions[0].flags = ONES
    assert BY_NAME["blocked_signals"].take(core) == ONES & ~NEVER_BLOCKED
    _, flags, _, mask = BY_NAME["signal_actions"].take(core)[0]
    assert mask == ONES & ~NEVER_BLOCKED
    assert flags == 0xDC00_0807  # neither SA_IMMUTABLE nor an ABI of another mode


def test_what_is_left_inside():
    core = core_entry()
    core.thread_core.seccomp_mode = 2
    core.thread_core.creds.no_new_privs = 1
    core.tc.sigactions[3].compat_sigaction = True
    core.thread_core.futex_rla_len = 12
    for name in ("no_new_privs", "signal_actions", "robust_list", "pdeath_signal", "loginuid"):
        assert BY_NAME[name].take(core) is None
    assert BY_NAME["umask"].take(FsEntry()) is None
    assert BY_NAME["dumpable"].take(MmEntry()) is None
    assert BY_NAME["ipc_limits"].take(IpcVarEntry(msg_ctlmax=1)) is None
    assert BY_NAME["window_size"].take(TtyInfoEntry()) is None
    running = FileEntry()
    running.tfd.vnsec = 1
    assert BY_NAME["timerfd_ticks"].take(running) is None
    nowhere = FileEntry()
    nowhere.reg.pos = ONES
    assert BY_NAME["file_position"].take(nowhere) is None


def test_all_threads_and_descendants(kernel):
    root = kernel.process(threads=3, parent=kernel.process())
    child = kernel.process(threads=2, parent=root)
    grandchild = kernel.process(parent=child)
    stranger = kernel.process(parent=root.real_parent)
    BY_NAME["personality"].write(root, 8)
    BY_NAME["loginuid"].write(root, 7)
    assert {(t.personality, t.loginuid.val) for t in for_each_thread(root)} == {(8, 7)}
    next(for_each_thread(root)).personality = 9
    assert BY_NAME["personality"].read(root) is None
    BY_NAME["child_subreaper"].write(root, True)
    flags = [(t.signal.is_child_subreaper, t.signal.has_child_subreaper)
             for t in (root, child, grandchild, stranger)]  # fmt: skip
    assert flags == [(1, 0), (0, 1), (0, 1), (0, 0)]
    grandchild.signal.has_child_subreaper = 0
    assert BY_NAME["child_subreaper"].read(root) is None


def test_bits_beside_stay(kernel):
    task = kernel.process()
    task.atomic_flags = ONES & ~1
    BY_NAME["no_new_privs"].write(task, True)
    assert task.atomic_flags == ONES
    flags = address_of(task.mm, "flags").cast_("unsigned long")
    flags[0] = ONES
    BY_NAME["dumpable"].write(task, 1)
    assert flags[0] == (ONES if kernel.new else ONES & ~2)
    files = kernel.files()
    files.fdt.close_on_exec[1] = ONES
    BY_NAME["close_on_exec"].write(Descriptor(files, 70), False)
    assert files.fdt.close_on_exec[1] == ONES & ~(1 << 6)
    assert files.fdt.close_on_exec[0] == 0


@pytest.mark.parametrize("name", ["securebits", "capabilities"])
def test_credentials_in_use_elsewhere_are_refused(kernel, name):
    task = kernel.process(parent=kernel.process())
    value = VALUES[name][1][-1]
    task.cred.usage.counter = 3
    with pytest.raises(AttemptFailed, match="in use elsewhere"):
        BY_NAME[name].write(task, value)
    task.cred.usage.counter = 2
    task.real_cred = kernel.make("struct cred")
    with pytest.raises(AttemptFailed, match="in use elsewhere"):
        BY_NAME[name].write(task, value)


def test_unknown_capabilities_are_refused(kernel):
    task = kernel.process(parent=kernel.process())
    with pytest.raises(AttemptFailed, match="0x20000000000"):
        BY_NAME["capabilities"].write(task, (0, 1 << 41, 0, 0, 0))


@pytest.mark.parametrize(("value", "bound"), [(500, 0), (0, 0), (-300, -300)])
def test_oom_score_adj_in_a_user_namespace(kernel, value, bound):
    """CRIU is not privileged there: the lower bound stays, and the process may go back to it."""
    task, kind = kernel.process(), BY_NAME["oom_score_adj"]
    kernel.user_ns.level = 1
    kind.write(task, value)
    assert (task.signal.oom_score_adj, task.signal.oom_score_adj_min) == (value, bound)
    assert kind.read(task) == value
    task.signal.oom_score_adj_min = value + 1
    assert kind.read(task) is None


def test_values_that_do_not_fit(kernel):
    with pytest.raises(AttemptFailed, match="the kernel has 46"):
        BY_NAME["auxv"].write(kernel.make("struct mm_struct"), (1,) * 47)
    with pytest.raises(DoesNotFit):
        BY_NAME["ipc_limits"].write(kernel.make("struct ipc_namespace"), {"shm_ctlmni": 1 << 31})


def test_types_of_the_guest_that_make_no_sense():
    """A number in place of a struct is an error of the guest, not a TypeError."""
    binding = SimpleNamespace(find=lambda guest: guest, label="task 1")
    kind = SimpleNamespace(read=lambda task: task.fs.umask, name="umask")
    setting = SimpleNamespace(kind=kind, binding=binding, value=0)
    with pytest.raises(KernelNotFound, match="types are invalid"):
        verify([setting], SimpleNamespace(fs=7))


def test_a_mistake_of_ours_is_none_of_the_guest():
    """It must not end as an unsupported kernel, exit code 4."""
    binding = SimpleNamespace(find=lambda guest: guest, label="task 1")
    kind = SimpleNamespace(read=lambda task: task.nonexistent, name="umask")
    setting = SimpleNamespace(kind=kind, binding=binding, value=0)
    with pytest.raises(AttributeError, match="nonexistent"):
        verify([setting], SimpleNamespace())
    unlike = SimpleNamespace(kind=SimpleNamespace(read=lambda task: 1), binding=binding, value=0)
    with pytest.raises(AttributeError, match="name"):  # in what reports the difference
        verify([unlike], SimpleNamespace())
