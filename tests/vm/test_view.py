"""The kernel view against other readers of the same guest: drgn, and the guest's own /proc."""

import time
from pathlib import Path

import drgn
import numpy as np
import pytest
from drgn import TypeKind
from drgn.helpers.linux.list import list_for_each_entry

from ovr._fastcopy import PROTNONE
from ovr.errors import KernelNotFound, UsageError
from ovr.kernel import (
    Kernel,
    find_task,
    for_each_process,
    for_each_thread,
    kernel,
    mm_space,
    processes,
    vmas,
)
from ovr.kernel.types.view import Array, Pointer, Struct
from ovr.lab.workload import build_workload
from ovr.memory.paging import pieces
from ovr.vm.attach import AttachedVm
from ovr.vm.hold import Holder
from tests.unit.kernel.writers import elf
from tests.vm.conftest import EVERYTHING, SUITES
from tests.vm.drgn_reader import drgn_program
from tests.vm.test_failures import ovr_command
from tests.vm.test_ps import BUSY

VM_PFNMAP = 0x400
PARTS = ("signal", "sighand", "mm", "fs", "files", "nsproxy", "cred", "thread_pid", "cgroups")
# structs of their own behind those, where states are written
DEEPER = {"nsproxy": ("uts_ns", "ipc_ns"), "files": ("fdt",), "cred": ("user_ns",)}


# Of the structs that a task leads to, newer kernels have others.
newest_too = pytest.mark.parametrize(
    "suite", SUITES if EVERYTHING else ("trixie", "forky"), indirect=True
)


@pytest.fixture
def attached(vm):
    with AttachedVm(f"lab:{vm.name}") as attached:
        yield attached


@pytest.fixture
def busy(vm, attached):
    """The same, busy, and then held still.

    Not by QMP's stop and cont, after which vhost-device-vsock may be deaf.
    """
    vm.sh(BUSY + "sleep 1")
    with Holder(attached.qmp, attached.check_same_boot, bound=600) as holder, holder.held():
        yield attached
    vm.sh("pkill -9 -x sleep; pkill -9 -f 'while :'")


class Comparison:
    """Values of ours and drgn's; `different` must stay empty."""

    def __init__(self) -> None:
        self.same = 0
        self.different: list[tuple] = []

    def value(self, path, ours, theirs):
        if ours == theirs:
            self.same += 1
        else:
            self.different.append((path, ours, theirs))

    def struct(self, path, ours, theirs, depth):
        for name in ours.types_.fields(ours.id_):
            if not name.endswith("_"):
                try:
                    value = getattr(ours, name)
                except TypeError:  # void, functions, incomplete types
                    continue
                self.member(f"{path}.{name}", value, getattr(theirs, name), depth)

    def member(self, path, ours, theirs, depth):
        kind = underlying(theirs.type_)
        match ours:
            case Struct() if kind.kind != TypeKind.POINTER:
                self.value(path, ours.address_, theirs.address_)
                if depth:
                    self.struct(path, ours, theirs, depth - 1)
            case Struct() | Pointer():
                self.value(path, ours.address_, theirs.value_())
            case str():
                self.value(path, ours.encode(errors="surrogateescape"), theirs.string_())
            case Array():
                self.value(path, len(ours), kind.length or 0)
                for index in range(min(len(ours), 16)):
                    self.member(f"{path}[{index}]", ours[index], theirs[index], depth)
            case _:
                self.value(path, ours, theirs.value_())


def underlying(kind):
    while kind.kind == TypeKind.TYPEDEF:
        kind = kind.type
    return kind


@newest_too
def test_every_field_of_every_task_agrees_with_drgn(busy):
    program = drgn_program(busy)
    found = Comparison()
    tasks = [thread for task in for_each_process(busy.kernel) for thread in for_each_thread(task)]
    for task in tasks:
        theirs = drgn.Object(program, "struct task_struct", address=task.address_)
        found.struct("task", task, theirs, 2)
        for name in PARTS:
            part = getattr(task, name)
            if part:
                found.struct(f"task.{name}", part, getattr(theirs, name)[0], 2)
                for inner in DEEPER.get(name, ()):
                    deeper = getattr(getattr(theirs, name), inner)
                    found.struct(f"{name}.{inner}", getattr(part, inner), deeper[0], 1)
    assert found.different == []
    assert len(tasks) > 50
    assert found.same > 1000 * len(tasks)
    print(f"{found.same} values of {len(tasks)} tasks are the same")


@newest_too
def test_every_task_is_found_that_drgn_finds(busy):
    program = drgn_program(busy)
    start = program.symbol("init_task").address
    init = drgn.Object(program, "struct task_struct", address=start)
    theirs = {
        (thread.pid.value_(), thread.value_())
        for task in list_for_each_entry("struct task_struct", init.tasks.address_of_(), "tasks")
        for thread in list_for_each_entry(
            "struct task_struct", task.signal.thread_head.address_of_(), "thread_node"
        )
    }
    ours = {
        (thread.pid, thread.address_)
        for task in for_each_process(busy.kernel)
        for thread in for_each_thread(task)
    }
    assert ours == theirs
    assert all(find_task(busy.kernel, pid).address_ == address for pid, address in ours)


def test_every_symbol_agrees_with_drgn(attached):
    ours, theirs = set(attached.kernel.symbols), drgn_program(attached).symbols()
    assert ours == {(symbol.name, symbol.address) for symbol in theirs}
    assert len(ours) > 50_000


def pages_by_proc(vm, pid, areas):
    """Return the frame of each present page of each area, by /proc/PID/pagemap."""
    wanted = " ".join(f"{start >> 9}:{(end - start) >> 9}" for start, end in areas)
    done = vm.sh(
        f"for area in {wanted}; do dd if=/proc/{pid}/pagemap bs=64K status=none "
        "iflag=skip_bytes,count_bytes skip=${area%:*} count=${area#*:}; done"
    )
    entries = np.frombuffer(done.stdout, "<u8")
    addresses = np.concatenate([np.arange(start, end, 4096) for start, end in areas])
    assert len(entries) == len(addresses)
    there = entries >> 63 == 1
    frames = entries[there] & np.uint64((1 << 55) - 1)
    return dict(zip(addresses[there].tolist(), frames.tolist(), strict=True))


def pages_by_walk(space, areas):
    runs = space.walk(pieces([(start, end - start, 0) for start, end in areas]))
    found = {}
    for run in runs:
        for at in range(0, int(run["size"]), 4096):
            found[int(run["gva"]) + at] = (int(run["gpa"]) + at) >> 12
    return found, runs


def compare_pages(vm, kernel, pid):
    """Compare the two at a moment in which the guest moves no page of the process."""
    task = find_task(kernel, pid)
    for _ in range(20):
        areas = [(v.start, v.end) for v in vmas(task.mm) if not v.flags & VM_PFNMAP]
        before = pages_by_proc(vm, pid, areas)
        walked, runs = pages_by_walk(mm_space(kernel, task.mm), areas)
        if before == pages_by_proc(vm, pid, areas):
            assert walked == before
            return walked, runs
    pytest.fail(f"the pages of process {pid} never rest")


def test_every_page_agrees_with_pagemap(vm, attached, tmp_path):
    program = build_workload(Path(__file__).with_name("areas.c"))
    vm.put(program, "/tmp/areas", 0o755)
    started = vm.sh(
        "/tmp/areas /usr/bin/dpkg > /tmp/areas.out & echo $!;"
        "while ! grep -q ready /tmp/areas.out; do sleep 0.1; done"
    )
    pid = int(started.stdout)
    try:
        walked, runs = compare_pages(vm, attached.kernel, pid)
        huge = runs[runs["page_shift"] == 21]
        assert huge["size"].sum() >= 3 * (2 << 20)
        hidden = runs[runs["flags"] & PROTNONE != 0]
        assert {12, 21} <= set(hidden["page_shift"].tolist())
        assert hidden["size"].sum() >= (32 << 12) + (2 << 21)
        assert len(walked) > 5 * 512
        for other in (1, *started_by_the_system(attached.kernel, pid)):
            compare_pages(vm, attached.kernel, other)
    finally:
        vm.sh(f"kill -9 {pid}")


def started_by_the_system(kernel, but):
    """Other processes that have memory and are not the shell that we ask through."""
    return [
        process.pid for process in processes(kernel)
        if not process.kernel and process.pid not in (1, but) and process.comm != "ovr-agent"
        and process.state == "S"
    ][:3]  # fmt: skip


def test_a_kernel_that_keeps_nothing_in_memory(vm, attached, tmp_path, monkeypatch):
    """--vmlinux: a file with this kernel's symbols and BTF; kallsyms and BTF hidden from us."""
    seen = attached.kernel
    slide = int(seen.info.values["KERNELOFFSET"], 16)
    symbols = [(name, at - slide if at >= 1 << 63 else at) for name, at in seen.symbols]
    types = kernel._read_btf(seen.space, seen.symbols)
    notes = seen.symbol("__start_notes")
    text = seen.space.read(notes, seen.symbol("__stop_notes") - notes)
    build_id = bytes.fromhex(seen.build_id)
    at = notes + text.index(b"GNU\0" + build_id) + 4 - slide
    sections = {".text": (0xFFFF_FFFF_8100_0000, b"\x90"), ".BTF": (0, types)}
    path, other = tmp_path / "vmlinux", tmp_path / "other"
    path.write_bytes(elf(sections, symbols, (at, build_id)))
    other.write_bytes(elf(sections, symbols, (at, build_id[::-1])))

    def hidden(*arguments):
        raise KernelNotFound("hidden")

    monkeypatch.setattr(kernel, "read_kallsyms", hidden)
    monkeypatch.setattr(kernel, "_read_btf", hidden)
    with pytest.raises(KernelNotFound, match="hidden"):
        Kernel.find(attached.ram)
    with pytest.raises(KernelNotFound, match="of another kernel"):
        Kernel.find(attached.ram, other)
    with pytest.raises(UsageError, match="no usable ELF"):
        Kernel.find(attached.ram, Path("/etc/passwd"))
    found = Kernel.find(attached.ram, path)
    assert found.private_frames == seen.private_frames
    names = {process.pid: process.comm for process in processes(found)}
    assert names[1] == vm.sh("cat /proc/1/comm").stdout.decode().strip()

    attached.close()  # QMP takes one client at a time
    for file, code in ((path, 0), (other, 4), ("/etc/passwd", 2)):
        done = ovr_command("ps", "--vm", f"lab:{vm.name}", "--vmlinux", file)
        assert done.returncode == code, done.stderr


def test_attach_is_quick_enough_to_be_bearable(vm, tmp_path, monkeypatch):
    """Not a benchmark (bench/ has those): finds what is slower by an order of magnitude."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    began = time.process_time()
    for _ in range(2):
        AttachedVm(f"lab:{vm.name}").close()
    assert time.process_time() - began < 5
    assert len(list((tmp_path / "ovr" / "kernel").iterdir())) == 3
