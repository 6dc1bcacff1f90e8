"""How long it takes to attach, and how fast the kernel view is beside drgn on the same RAM."""

import shutil

import drgn
import pytest
from drgn.helpers.linux.list import list_for_each_entry

from ovr.kernel import for_each_process
from ovr.vm.attach import AttachedVm
from ovr.vm.hold import Holder
from tests.vm.drgn_reader import drgn_program

COLD, CACHED = 0.5, 0.05
TIMES: dict[tuple[str, str], float] = {}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def attach(vm):
    AttachedVm(f"lab:{vm.name}", writable=True).close()


def inodes(cache):
    """Of the files that only a rebuild replaces."""
    return {path.stat().st_ino for path in (cache / "ovr" / "kernel").glob("*.*")}


@pytest.mark.benchmark(group="attach")
def test_attach_cold(benchmark, vm, cache, judge):
    def forget():
        shutil.rmtree(cache / "ovr", ignore_errors=True)

    benchmark.pedantic(attach, (vm,), setup=forget, rounds=10)
    assert len(list((cache / "ovr" / "kernel").iterdir())) == 3
    judge(benchmark, COLD)


@pytest.mark.benchmark(group="attach")
def test_attach_from_cache(benchmark, vm, cache, judge):
    attach(vm)
    made = inodes(cache)
    benchmark.pedantic(attach, (vm,), rounds=20)
    assert made <= inodes(cache)
    judge(benchmark, CACHED)


@pytest.fixture(scope="module", params=("ovr", "drgn"))
def reader(request, attached):
    """The same task as each of the two has it: (name, task, how to get a value, all processes)."""
    task = attached.kernel["init_task"]
    if request.param == "ovr":
        return "ovr", task, lambda value: value, lambda: for_each_process(attached.kernel)
    program = drgn_program(attached)
    theirs = drgn.Object(program, "struct task_struct", address=task.address_)
    tasks = theirs.tasks.address_of_()
    return (
        "drgn", theirs, lambda value: value.value_(),
        lambda: list_for_each_entry("struct task_struct", tasks, "tasks"),
    )  # fmt: skip


def remember(benchmark, what, name):
    """Keep the best time; drgn's, which comes second, must not be better than ours."""
    if benchmark.stats is None:
        return
    best = TIMES[what, name] = benchmark.stats.stats.min
    benchmark.extra_info["per_second"] = round(1 / best)
    if name == "drgn" and (what, "ovr") in TIMES:
        benchmark.extra_info["times_as_fast"] = best / TIMES[what, "ovr"]
        assert TIMES[what, "ovr"] < best


@pytest.mark.benchmark(group="read a member: task->pid")
def test_read_member(benchmark, reader):
    name, task, value, _ = reader
    assert benchmark(lambda: value(task.pid)) == 0
    remember(benchmark, "member", name)


@pytest.mark.benchmark(group="read through pointers: task->signal->rlim[7].rlim_cur")
def test_read_path(benchmark, reader):
    name, task, value, _ = reader
    assert benchmark(lambda: value(task.signal.rlim[7].rlim_cur)) > 0
    remember(benchmark, "path", name)


@pytest.mark.benchmark(group="list all processes: pid, flags, mm")
def test_list_processes(benchmark, reader):
    name, _, value, processes = reader

    def listing():
        return [(value(task.pid), value(task.flags), value(task.mm)) for task in processes()]

    assert len(benchmark(listing)) > 20
    remember(benchmark, "list", name)


@pytest.mark.benchmark(group="write a member: task->fs->umask (drgn cannot)")
def test_write_member(benchmark, attached):
    fs = attached.kernel["init_task"].fs

    def write():
        fs.umask = 0o022

    assert fs.umask == 0o022
    # SAFETY: nothing changes, and the VM is held.
    with Holder(attached.qmp, ram=attached.ram, bound=60) as holder, holder.held():
        benchmark(write)
    remember(benchmark, "write", "ovr")
