"""Control groups: a small hierarchy, in both layouts of kernfs, and damaged."""

import pytest

from ovr.errors import GuestFault
from ovr.kernel.linux.cgroup import cgroup_path, mem_cgroup, pids_cgroup, task_css, task_dfl_cgroup
from ovr.kernel.types.btf import Btf
from ovr.kernel.types.types import Types
from ovr.kernel.types.view import NoSuchMember

from .writers import BtfWriter, Memory

BASE = 0xFFFF_8880_0000_0000
TASK, SET, GROUP, MEMORY, PIDS, NODES, NAMES = (BASE + 0x1000 * n for n in range(1, 8))


def cgroup_types(parent: str) -> Types:
    w = BtfWriter()
    char, u64 = w.integer("char", 1, signed=True), w.integer("long unsigned int", 8)
    node_p = w.pointer()
    node = w.struct("kernfs_node", 24, (parent, node_p, 0), ("name", w.pointer(char), 8))
    w.point(node_p, node)
    group = w.struct("cgroup", 64, ("kn", node_p, 32))
    css = w.struct("cgroup_subsys_state", 16, ("cgroup", w.pointer(group), 0))
    css_set = w.struct(
        "css_set", 64, ("subsys", w.array(w.pointer(css), 4), 0), ("dfl_cgrp", w.pointer(group), 48)
    )
    w.struct("task_struct", 64, ("cgroups", w.pointer(css_set), 8))
    w.struct("mem_cgroup", 64, ("css", css, 16), ("max", u64, 40))
    w.struct("pids_cgroup", 64, ("css", css, 0), ("limit", u64, 32))
    w.enum("cgroup_subsys_id", cpu_cgrp_id=0, memory_cgrp_id=1, pids_cgrp_id=2)
    return Types(Btf(w.build()))


@pytest.fixture(params=["parent", "__parent"])
def task(request):
    memory = Memory(BASE, 1 << 16)
    memory.poke(TASK + 8, "Q", SET)
    memory.poke(SET, "4Q", 0, MEMORY + 16, PIDS, 0)
    memory.poke(SET + 48, "Q", GROUP)
    memory.poke(MEMORY + 40, "Q", 1 << 20)
    memory.poke(PIDS + 32, "Q", 77)
    for number, name in enumerate((b"", b"a b", b"\xff", b"c")):
        memory.poke(NODES + 32 * number, "QQ", NODES + 32 * (number - 1) if number else 0,
                    NAMES + 16 * number)  # fmt: skip
        memory.poke(NAMES + 16 * number, "16s", name)
    memory.poke(GROUP + 32, "Q", NODES + 32 * 3)
    return cgroup_types(request.param).pointer("struct task_struct", memory, TASK)


def test_the_group_of_a_task(task):
    assert cgroup_path(task_dfl_cgroup(task)) == "/a b/\udcff/c"
    assert mem_cgroup(task).max == 1 << 20
    assert pids_cgroup(task).limit == 77
    assert task_css(task, "memory").address_ == MEMORY + 16
    with pytest.raises(NoSuchMember, match="no cgroup controller cpuset"):
        task_css(task, "cpuset")


def test_the_root(task):
    task.space_.poke(GROUP + 32, "Q", NODES)
    assert cgroup_path(task_dfl_cgroup(task)) == "/"


def test_a_hierarchy_without_end(task):
    task.space_.poke(NODES, "Q", NODES + 32)
    with pytest.raises(GuestFault, match="has no root"):
        cgroup_path(task_dfl_cgroup(task))


def test_a_name_without_end(task):
    task.space_.poke(NAMES + 48, "4096s", b"x" * 4096)
    with pytest.raises(GuestFault):
        cgroup_path(task_dfl_cgroup(task))
