"""The plan of real dumps: every page has a place and a reason, and the inside set says the same."""

from pathlib import Path

import numpy as np
import pytest

from ovr.addresses import PAGE_SIZE
from ovr.errors import UsageError
from ovr.images import ImageSet, image_chunks
from ovr.images.vma import MADV_POPULATE_WRITE, PROT_WRITE, VMA_ANON_PRIVATE
from ovr.placement import Reason
from ovr.plan import make_plan
from ovr.state import KINDS


def pages_of(starts, sizes):
    return {
        start + n
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
        for n in range(0, size, PAGE_SIZE)
    }


def entries_of(memory):
    return pages_of(memory.entries["vaddr"], memory.entries["nr_pages"] * np.uint64(PAGE_SIZE))


@pytest.fixture(params=["one", "tree", "parent"])
def images(request, dumps):
    with ImageSet.open(dumps / request.param) as images:
        yield images


@pytest.fixture
def inside(images, tmp_path):
    plan = make_plan(images)
    target = tmp_path / "inside"
    target.mkdir()
    for name, content in plan.inside_images().items():
        (target / name).write_bytes(b"".join(image_chunks(content)))
    with ImageSet.open(target) as inside:
        yield plan, inside


def test_every_page_is_placed_once(images):
    plan = make_plan(images)
    assert len(plan.tasks) == sum(task.alive for task in images.tasks)
    for task in plan.tasks:
        assert pages_of(task.runs["start"], task.runs["size"]) == entries_of(task.task.memory)
        assert sum(task.by_reason().values()) == task.bytes_total
    assert plan.bytes_outside < plan.bytes_total
    # Parent and child of this tree have all of their areas in common.
    assert (plan.bytes_outside == 0) == (len(plan.tasks) > 1)


def test_pieces_hold_the_right_bytes(images):
    """What would be written at an address is what the images have for that address."""
    for task in make_plan(images).tasks:
        entries = task.task.memory.entries
        offset_of = {
            (int(e["vaddr"]) + n * PAGE_SIZE): (int(e["level"]), int(e["offset"]) + n * PAGE_SIZE)
            for e in entries
            for n in range(int(e["nr_pages"]))
        }
        for level, pieces in task.pieces.items():
            for gva, size, offset in pieces.tolist():
                for n in range(0, size, PAGE_SIZE):
                    assert offset_of[gva + n] == (level, offset + n)


def test_the_inside_set_has_the_rest(inside):
    plan, images = inside
    for before, task in zip(plan.tasks, (t for t in images.tasks if t.alive), strict=True):
        kept = before.runs[before.runs["reason"] != Reason.OUTSIDE]
        assert entries_of(task.memory) == pages_of(kept["start"], kept["size"])
        assert len(task.memory.entries) > 0
        assert task.umask == 0


def test_areas_are_cut_and_populated_where_pages_go_outside(inside):
    plan, images = inside
    for before, task in zip(plan.tasks, (t for t in images.tasks if t.alive), strict=True):
        outside = before.runs[before.runs["reason"] == Reason.OUTSIDE]
        bit = np.uint64(1 << MADV_POPULATE_WRITE)
        populated = task.vmas[(task.vmas["madv"] & bit) != 0]
        sizes = populated["end"] - populated["start"]
        assert pages_of(populated["start"], sizes) == pages_of(outside["start"], outside["size"])
        assert (populated["prot"] & PROT_WRITE).all()
        assert (populated["status"] & VMA_ANON_PRIVATE).all()
        old, new = before.task.vmas, task.vmas
        assert set(old["start"].tolist()) <= set(new["start"].tolist())
        assert set(old["end"].tolist()) <= set(new["end"].tolist())
        assert int((old["end"] - old["start"]).sum()) == int((new["end"] - new["start"]).sum())


def test_late_pages_stay_inside(images):
    for task in make_plan(images).tasks:
        for core in task.task.cores.values():
            sp = core.thread_info.gpregs.sp
            for run in task.runs[task.runs["reason"] == Reason.OUTSIDE]:
                assert not run["start"] <= sp < run["start"] + run["size"]


def test_parent_and_child_keep_what_they_may_share(dumps):
    with ImageSet.open(dumps / "tree") as images:
        plan = make_plan(images)
        reasons = [set(task.by_reason()) for task in plan.tasks]
    assert len(reasons) > 1
    assert all(Reason.INHERITED in found for found in reasons)


@pytest.mark.parametrize(
    ("outside", "states"),
    [(("memory",), ("memory",)), (("umask",), ("umask",)), (("memory", "umask"),) * 2],
)
def test_kinds_can_be_chosen(dumps, outside, states):
    with ImageSet.open(dumps / "one") as images:
        plan = make_plan(images, outside)
        assert plan.states == states
        assert (plan.bytes_outside > 0) == ("memory" in states)
        before = {name: (dumps / "one" / name).read_bytes() for name in images.names}
        built = plan.inside_images()
        pid = images.tasks[0].pid
        assert (built[f"fs-{pid}.img"] != before[f"fs-{pid}.img"]) == ("umask" in states)
        assert (built[f"mm-{pid}.img"] != before[f"mm-{pid}.img"]) == ("memory" in states)
        unchanged = {"core", "ids", "files.img", "pstree.img", "inventory.img"}
        for name in images.names:
            if name.partition("-")[0] in unchanged:
                assert built[name] == before[name]


def test_a_group_is_all_kinds_of_it(dumps):
    with ImageSet.open(dumps / "one") as images:
        wanted = {kind.name for kind in KINDS if "mm" in kind.groups}
        assert wanted == {"code_bounds", "arguments", "brk", "auxv", "dumpable"}
        assert set(make_plan(images, ["mm"]).states) == wanted
        assert set(make_plan(images, ["mm", "comm"]).states) == wanted | {"comm"}


def test_all_kinds_that_the_images_have(dumps):
    with ImageSet.open(dumps / "uts") as images:
        states = make_plan(images).states
        missing = {kind.name for kind in KINDS} - set(states)
    assert states[0] == "memory"
    # No program of these dumps has a timerfd, a terminal or a parent-death signal; and CRIU says
    # nothing of no_new_privs where it is not set.
    assert missing == {"no_new_privs", "timerfd_ticks", "pdeath_signal", "window_size"}


def test_an_unknown_kind(dumps):
    with ImageSet.open(dumps / "one") as images, pytest.raises(UsageError) as caught:
        make_plan(images, ["memory", "shoes"])
    assert "shoes" in str(caught.value)
    assert "umask" in caught.value.hint
    assert "container" in caught.value.hint


def test_a_plan_reads_and_does_not_write(dumps):
    def state(path: Path):
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}

    before = state(dumps)
    with ImageSet.open(dumps / "tree") as images:
        make_plan(images).inside_images()
    assert state(dumps) == before
