"""Finding a kernel in RAM, and its tasks and mappings: a toy one, whole and damaged."""

from types import SimpleNamespace

import pytest

from ovr.errors import GuestFault, KernelNotFound
from ovr.kernel import (
    Kernel,
    find_task,
    for_each_process,
    for_each_thread,
    is_kernel_thread,
    is_traced,
    mm_space,
    processes,
    task_active_pid_ns,
    task_comm,
    task_state,
    vmas,
)
from ovr.kernel.linux.tasks import Process
from ovr.memory.addresses import Gpa, Gva
from ovr.memory.paging import Frames
from ovr.memory.ram import GuestRam

from ..machine import Machine
from .test_containers import Maple
from .toy import DIRECT_MAP, GLOBALS, ToyKernel
from .writers import ENCODINGS


@pytest.fixture
def machine(tmp_path):
    return Machine.build(tmp_path)


@pytest.fixture
def toy(machine):
    return ToyKernel(machine)


@pytest.fixture
def kernel(toy):
    return Kernel.find(toy.machine.ram)


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("tk_data", [False, True])
def test_a_kernel_is_found(tmp_path, levels, encoding, tk_data):
    machine = Machine.build(tmp_path, levels=levels)
    low = frozenset({"cpu_counter", "per_cpu_item"})  # only two encodings can hold these
    percpu = frozenset() if encoding.startswith("absolute") else low
    ToyKernel(machine, encoding=encoding, tk_data=tk_data, without=percpu)
    kernel = Kernel.find(machine.ram)
    assert kernel.release == "6.12.0-toy"
    assert kernel.build_id.startswith("0123456789abcdef")
    assert (kernel.space.root, kernel.space.levels) == (machine.root, levels)
    assert kernel["init_task"].comm == "swapper/0"
    assert kernel["page_offset_base"] == DIRECT_MAP
    assert kernel.wall_clock() == 1_800_000_000
    assert kernel.same_boot()


def test_no_kernel_at_all(machine):
    with pytest.raises(KernelNotFound, match="no VMCOREINFO") as caught:
        Kernel.find(machine.ram)
    assert "booted" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"note_lines": {"sme": "NUMBER(sme_mask)=2048"}}, "encrypted", "memory encryption"),
        ({"note_lines": {"OSRELEASE": "OSRELEASE=6.1.0-old"}}, "describes no kernel", "rebooted"),
        ({"note_lines": {"phys_base": "NUMBER(phys_base)=2097152"}}, "describes no kernel", ""),
        ({"note_lines": {"uts_name": None}}, "Linux 6.12.0-toy does not say", "Linux 6.1 "),
        ({"without": frozenset({"__start_BTF"})}, "does not describe its types", "DEBUG_INFO_BTF"),
        ({"without": frozenset({"init_pid_ns"})}, "no symbol init_pid_ns", "KALLSYMS_ALL"),
        ({"btf": b"\0" * 100}, "BTF is damaged", "vmlinux"),
    ],
)  # fmt: skip
def test_kernels_that_cannot_be_used(machine, changes, message, hint):
    ToyKernel(machine, **changes)
    with pytest.raises(KernelNotFound, match=message) as caught:
        Kernel.find(machine.ram)
    assert hint in caught.value.hint


def test_a_kernel_that_has_not_booted_yet(toy):
    toy.poke(toy.symbols["init_pid_ns"] + 24, "Q", 0)
    with pytest.raises(KernelNotFound, match="has not started its first process"):
        Kernel.find(toy.machine.ram)


def second_machine(machine: Machine) -> Machine:
    root = machine.new_table()
    return Machine(machine.ram, machine.levels, root, 0x8_0000)


@pytest.mark.parametrize(("first", "second"), [(100, 200), (200, 100)])
def test_of_two_whole_kernels_the_one_with_the_later_clock_runs(machine, first, second):
    ToyKernel(machine, clock=first, release="first")
    ToyKernel(
        second_machine(machine), image=0x60_0000, note=0x10_0000, heap=0x30_0000,
        base=0xFFFF_FFFF_9A00_0000, clock=second, release="second",
    )  # fmt: skip
    assert Kernel.find(machine.ram).release == ("first" if first > second else "second")


def test_a_stale_note_does_no_harm(machine):
    toy = ToyKernel(machine)
    text = machine.ram.read(Gpa(toy.note), 4096)
    for gpa, old in ((0x10_0000, b"9.9"), (0x7F_F000, b"0.1")):
        machine.ram.write(Gpa(gpa), text.replace(b"6.12.0", old))
    assert Kernel.find(machine.ram).release == "6.12.0-toy"


def test_a_dead_kernel_whose_tables_serve_the_next_one(machine):
    # Seen on a rebooted guest: its notes, text and release are all right, its data is another's.
    toy = ToyKernel(machine, release="dead")
    machine.map(toy.base + (2 << 20), toy.image + (2 << 20), shift=21)
    assert Kernel.find(machine.ram).release == "dead"
    machine.map(toy.base + (4 << 20), toy.image, shift=21)
    with pytest.raises(KernelNotFound, match="describes no kernel in RAM"):
        Kernel.find(machine.ram)


def test_a_reboot_is_noticed(toy, kernel):
    assert kernel.same_boot()
    first = kernel["init_pid_ns"].child_reaper.address_
    toy.poke(first + 176, "Q", 5)
    assert not kernel.same_boot()
    toy.poke(first + 176, "Q", toy.booted)
    assert kernel.same_boot()
    toy.machine.ram.write(Gpa(toy.note), b"OSRELEASE=6.12.1-toy\n")
    assert not kernel.same_boot()


def test_memory_that_was_wiped_is_not_the_same_kernel(toy, kernel):
    toy.machine.ram.write(toy.machine.root, bytes(4096))
    assert not kernel.same_boot()


def test_tasks_and_threads(toy, kernel):
    shell = toy.fork(300, "sh", parent=kernel["init_pid_ns"].child_reaper.address_)
    for tid in (301, 302):
        toy.fork(tid, f"thread-{tid}", parent=0, leader=shell)
    toy.poke(shell, "I", 1)
    assert processes(kernel) == [
        Process(pid=1, ppid=0, comm="init", state="R", tids=(1,), kernel=False),
        Process(pid=300, ppid=1, comm="sh", state="S", tids=(300, 301, 302), kernel=False),
    ]
    assert processes(kernel)[1].threads == 3
    assert [task.comm for task in for_each_process(kernel)] == ["init", "sh"]
    task = find_task(kernel, 301)
    assert (task.comm, task.tgid) == ("thread-301", 300)
    assert [t.pid for t in for_each_thread(task)] == [300, 301, 302]
    for pid in (0, 2, 64, 303, 4095, 1 << 30, -1):
        assert find_task(kernel, pid) is None


def test_a_task_by_its_number_in_a_namespace(toy, kernel):
    ns = toy.namespace(1)
    inner = toy.namespace(2, base=0)
    toy.fork(400, "ns-init", numbers=((1, ns),))
    toy.fork(401, "ns-child", numbers=((2, ns),))
    toy.fork(402, "inner-init", numbers=((3, ns), (1, inner)))
    outer = find_task(kernel, 400)
    assert find_task(kernel, 2, namespace_of=outer).comm == "ns-child"
    assert find_task(kernel, 3, namespace_of=outer).comm == "inner-init"
    assert find_task(kernel, 400, namespace_of=outer) is None
    deepest = find_task(kernel, 402)
    assert find_task(kernel, 1, namespace_of=deepest) == deepest
    assert task_active_pid_ns(deepest).address_ == inner


def test_a_task_list_that_loops_ends(toy, kernel):
    first = toy.symbols["init_task"] + 24
    node = toy.peek(first)
    toy.poke(node, "Q", node)
    with pytest.raises(GuestFault, match="a list has no end"):
        processes(kernel)


@pytest.mark.parametrize(
    ("at", "value"), [(8, DIRECT_MAP + 4), (0, None)], ids=["unaligned", "no such bit"]
)
def test_struct_pages_that_make_no_sense(toy, kernel, monkeypatch, at, value):
    if value is None:
        monkeypatch.setattr(kernel.types, "enum", lambda _: {"PG_anon_exclusive": 1 << 40})
    else:
        toy.poke(toy.base + GLOBALS + at, "Q", value)
    with pytest.raises(KernelNotFound, match=r"page is invalid|is bit 1099511627776"):
        kernel.private_frames  # noqa: B018


def test_more_threads_than_there_can_be(toy, kernel, monkeypatch):
    """Each list may be as long as all tasks are many, but not all of the lists together."""
    monkeypatch.setattr("ovr.kernel.linux.tasks.MAX_TASKS", 4)
    shell = toy.fork(300, "sh")
    for tid in (301, 302):
        toy.fork(tid, "thread", leader=shell)
    assert sum(process.threads for process in processes(kernel)) == 4
    toy.fork(303, "thread", leader=shell)
    with pytest.raises(GuestFault, match="more threads than there can be"):
        processes(kernel)


@pytest.mark.parametrize(
    ("state", "exit_state", "letter"),
    [
        (0, 0, "R"), (1, 0, "S"), (0x2001, 0, "S"), (2, 0, "D"), (0x102, 0, "D"), (0x402, 0, "I"),
        (0x104, 0, "T"), (8, 0, "t"), (0x108, 0, "t"), (0x40, 0, "P"), (0x80, 0x20, "Z"),
        (0x80, 0x10, "X"), (0x800, 0, "R"), (0x1000, 0, "D"), (0x8000, 0, "D"),
    ],
)  # fmt: skip
def test_state_letters(state, exit_state, letter):
    # The values are those of include/linux/sched.h, the letters those of proc_pid_status(5).
    task = SimpleNamespace(**{"__state": state}, exit_state=exit_state)
    assert task_state(task) == letter
    assert is_traced(task) == (letter == "t")


def kernel_thread(toy, comm, *, full="", desc="", busy=0, worker=True, pool=True):
    task = toy.fork(50, comm)
    toy.poke(task + 8, "I", 0x20_0000 | (0x20 if worker else 0))
    kthread = toy.allocate(16)
    toy.poke(task + 168, "Q", kthread)
    if full:
        name = toy.allocate(256)
        toy.poke(name, "100s", full.encode())
        toy.poke(kthread + 8, "Q", name)
    if worker:
        work = toy.allocate(48)
        toy.poke(kthread, "Q", work)
        toy.poke(work, "QQ32s", busy, 1 if pool else 0, desc.encode())


@pytest.mark.parametrize(
    ("comm", "options", "expected"),
    [
        ("kthreadd", {"worker": False}, "kthreadd"),
        ("rcu_tasks_kthre", {"worker": False, "full": "rcu_tasks_kthread"}, "rcu_tasks_kthread"),
        ("kworker/0:1", {}, "kworker/0:1"),
        ("kworker/0:1", {"desc": "events"}, "kworker/0:1-events"),
        ("kworker/0:1", {"desc": "events", "busy": 1}, "kworker/0:1+events"),
        ("kworker/0:1", {"desc": "events", "pool": False}, "kworker/0:1"),
        ("kworker/R-ext4-", {"full": "kworker/R-ext4-rsv"}, "kworker/R-ext4-rsv"),
        ("ext4-rsv-conver", {"full": "ext4-rsv-conversion"}, "ext4-rsv-conver"),
        ("long", {"worker": False, "full": "x" * 60}, "x" * 60),
    ],
)  # fmt: skip
def test_names_of_kernel_threads(toy, kernel, comm, options, expected):
    kernel_thread(toy, comm, **options)
    task = find_task(kernel, 50)
    assert is_kernel_thread(task)
    assert task_comm(task) == expected


def mapped(toy, ranges):
    """A process with these (start, end, flags, offset, file, ops) mappings."""
    task, mm = toy.fork(700, "mapped"), toy.allocate(128)
    toy.poke(task + 160, "Q", mm)
    entries = []
    for values in ranges:
        vma = toy.allocate(64)
        toy.poke(vma, "6Q", *values)
        entries.append((values[0], values[1] - 1, vma))
    proxy = SimpleNamespace(poke=toy.poke)
    writer = Maple(proxy, explicit=False)
    writer.free = toy.allocate(256 * 64)
    toy.poke(mm + 8, "Q", writer.build(entries))
    toy.poke(mm + 16, "Q", DIRECT_MAP + toy.machine.root)
    return mm


RANGES = [(0x1000 * n, 0x1000 * (n + 1), 0x10 | n % 16, n, n % 2, n % 3) for n in range(1, 200)]


def test_mappings(toy, kernel):
    mapped(toy, RANGES)
    found = vmas(find_task(kernel, 700).mm)
    assert [(v.start, v.end, v.flags, v.offset // 4096, v.file, v.anonymous) for v in found] == [
        (s, e, f, o, bool(file), not ops) for s, e, f, o, file, ops in RANGES
    ]
    assert [v.shared for v in found[:8]] == [bool(n & 8) for n in range(1, 9)]


def test_a_mapping_that_is_not_where_the_tree_says(toy, kernel):
    mapped(toy, RANGES)
    mm = find_task(kernel, 700).mm
    first = vmas(mm)[0]
    at = next(a for a in range(0x20_0000, toy.free, 256) if toy.peek(DIRECT_MAP + a) == first.start)
    toy.poke(DIRECT_MAP + at, "Q", 0x9000_0000)
    with pytest.raises(GuestFault, match="is not the one for"):
        vmas(mm)


def test_a_task_without_memory(kernel):
    with pytest.raises(GuestFault, match=r"task_struct\.mm is NULL"):
        vmas(find_task(kernel, 1).mm)


def test_the_space_of_a_process(toy, kernel):
    mm = mapped(toy, RANGES)
    task = find_task(kernel, 700)
    space = mm_space(kernel, task.mm)
    assert (space.root, space.levels) == (toy.machine.root, 4)
    toy.poke(mm + 16, "Q", DIRECT_MAP + 0x123)
    with pytest.raises(GuestFault, match="no page table"):
        mm_space(kernel, task.mm)
    toy.poke(mm + 16, "Q", 0x1234)
    with pytest.raises(GuestFault):
        mm_space(kernel, task.mm)


def test_page_frames(toy, kernel):
    assert kernel.private_frames == Frames(
        root=toy.machine.root, levels=4, vmemmap=Gva(DIRECT_MAP + (1 << 40)), stride=64,
        flags=0, mapping=24, compound_head=8,
        page_mask=1 << 11, folio_mask=1 << 15, folio_value=0, mapping_mask=3, mapping_value=1,
        dirty_mask=1 << 4, clean_mask=1 << 18 | 1 << 10, clean_value=1 << 18,
    )  # fmt: skip


def test_a_write_reaches_ram_if_it_is_writable(toy, kernel):
    fs = toy.allocate(8)
    task = find_task(kernel, 1)
    toy.poke(task.address_ + 184, "Q", fs)
    task.fs.umask = 0o137
    assert toy.peek(fs) == 0o137 << 32
    with GuestRam(toy.machine.ram.slots) as ram:
        task = find_task(Kernel.find(ram), 1)
        with pytest.raises(PermissionError):
            task.fs.umask = 0
    assert toy.peek(fs) == 0o137 << 32


def test_of_several_reasons_the_helpful_one_is_given(machine):
    toy = ToyKernel(machine, without=frozenset({"__start_BTF"}))
    text = machine.ram.read(Gpa(toy.note), 4096)
    for gpa in (0x10_0000, 0x7F_F000):
        machine.ram.write(Gpa(gpa), text.replace(b"6.12.0", b"9.99.9"))
    with pytest.raises(KernelNotFound, match="does not describe its types"):
        Kernel.find(machine.ram)
