"""The plan of real dumps: every page has a place and a reason, and the inside set says the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ovr.errors import UsageError
from ovr.images import ImageSet, image_chunks
from ovr.images.framing import decode, frames
from ovr.images.messages import MmEntry, PagemapEntry
from ovr.images.source import Sources
from ovr.images.vma import MADV_POPULATE_WRITE, PROT_WRITE, VMA_ANON_PRIVATE
from ovr.memory.addresses import PAGE_SIZE
from ovr.plan import NO_POOL, build_inside, make_plan
from ovr.plan.pages import Reason
from ovr.state import KINDS


def pages_of(starts, sizes):
    return {
        start + n
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
        for n in range(0, size, PAGE_SIZE)
    }


def entries_of(memory):
    return pages_of(memory.entries["gva"], memory.entries["size"])


@pytest.fixture(params=["one", "tree", "parent"])
def images(request, dumps):
    with ImageSet.open(dumps / request.param) as images:
        yield images


@pytest.fixture
def inside(images, tmp_path):
    plan = make_plan(images)
    target = tmp_path / "inside"
    target.mkdir()
    for name, content in build_inside(plan, NO_POOL).images.items():
        (target / name).write_bytes(b"".join(image_chunks(content)))
    with ImageSet.open(target) as inside:
        yield plan, inside


def test_every_page_is_placed_once(images):
    plan = make_plan(images)
    assert len(plan.tasks) == sum(task.alive for task in images.tasks)
    for task in plan.tasks:
        assert pages_of(task.runs["gva"], task.runs["size"]) == entries_of(task.task.memory)
        assert sum(task.by_reason().values()) == task.bytes_total
    assert 0 < plan.bytes_outside < plan.bytes_total
    assert (plan.bytes_cow > 0) == (len(plan.tasks) > 1)


def test_pieces_hold_the_right_bytes(images):
    """The planned content of each address is that of the images."""
    for task in make_plan(images).tasks:
        entries = task.task.memory.entries
        offset_of = {
            (int(e["gva"]) + n * PAGE_SIZE): (int(e["level"]), int(e["offset"]) + n * PAGE_SIZE)
            for e in entries
            for n in range(int(e["size"]) // PAGE_SIZE)
        }
        for level, pieces in task.pieces.items():
            for gva, size, offset in pieces.tolist():
                for n in range(0, size, PAGE_SIZE):
                    assert offset_of[gva + n] == (level, offset + n)


def test_the_inside_set_has_the_rest(inside):
    plan, images = inside
    for before, task in zip(plan.tasks, (t for t in images.tasks if t.alive), strict=True):
        kept = before.runs[before.runs["reason"] > Reason.INHERITED]
        assert entries_of(task.memory) == pages_of(kept["gva"], kept["size"])
        assert len(task.memory.entries) > 0
        assert task.umask == 0


def test_areas_are_cut_and_populated_where_pages_go_outside(inside):
    plan, images = inside
    for before, task in zip(plan.tasks, (t for t in images.tasks if t.alive), strict=True):
        wanted = before.pieces_of_criu
        bit = np.uint64(1 << MADV_POPULATE_WRITE)
        populated = task.vmas[(task.vmas["madv"] & bit) != 0]
        assert pages_of(populated["start"], populated["end"] - populated["start"]) == pages_of(
            wanted["start"], wanted["end"] - wanted["start"]
        )
        assert (populated["prot"] & PROT_WRITE).all()
        assert (populated["status"] & VMA_ANON_PRIVATE).all()
        old, new = before.task.vmas, task.vmas
        assert set(old["start"].tolist()) <= set(new["start"].tolist())
        assert set(old["end"].tolist()) <= set(new["end"].tolist())
        assert int((old["end"] - old["start"]).sum()) == int((new["end"] - new["start"]).sum())


def test_agent_and_criu_allocate_all_that_goes_outside(images):
    for task in make_plan(images).tasks:
        ranges = np.concatenate(
            [task.to_touch(), task.pieces_of_criu, task.sharing.cow.before_fork]
        )
        assert pages_of(ranges["start"], ranges["end"] - ranges["start"]) == pages_of(
            task.outside["gva"], task.outside["size"]
        )


def test_without_forced_writes_read_only_areas_stay_inside(images):
    for task in make_plan(images, force_write=False).tasks:
        vmas = task.task.vmas
        owner = np.searchsorted(vmas["start"], task.outside["gva"], side="right") - 1
        assert (vmas["prot"][owner] & PROT_WRITE).all()


def test_areas_that_lose_their_pages_look_as_if_they_had_some(images):
    """So CRIU maps them, and the kernel accounts for them, as without us."""
    plan = make_plan(images)
    built = build_inside(plan, NO_POOL).images
    for task in plan.tasks:
        name = f"pagemap-{task.task.pid}.img"
        _, *found = frames(built[name], name)
        entries = [decode(PagemapEntry, frame.payload, name) for frame in found]
        marks = [e.vaddr for e in entries if not (e.nr_pages or e.compat_nr_pages)]
        assert marks == [at + n for at in task.first_pages() for n in (0, 1)]
        for at in marks[::2]:
            vma = task.task.vmas[np.searchsorted(task.task.vmas["start"], at, side="right") - 1]
            runs = task.runs[task.runs["gva"] >= vma["start"]]
            assert runs[0]["gva"] == at < vma["end"]
            assert runs[0]["reason"] == Reason.OUTSIDE


def test_rseq_areas_are_spared(images):
    for task in make_plan(images).tasks:
        for core in task.task.cores.values():
            rseq = core.thread_core.rseq_entry
            if core.thread_core.HasField("rseq_entry"):
                ranges = task.spared.tolist()
                assert (rseq.rseq_abi_pointer, rseq.rseq_abi_pointer + rseq.rseq_abi_size) in ranges


def test_parent_and_child_keep_what_is_equal(dumps):
    """A page is kept in both exactly if CRIU would leave it shared."""
    with ImageSet.open(dumps / "tree") as images:
        plan = make_plan(images)
        parent, child = plan.tasks
        contents = [content_of(task.task) for task in (parent, child)]
        # CRIU compares the numbers of the files too, and has given one file two of them here.
        areas = [{*t.task.vmas[["start", "end", "shmid"]].tolist()} for t in (parent, child)]
        inherited = [range(start, end) for start, end, _ in areas[0] & areas[1]]
        common = {
            at
            for at in contents[0].keys() & contents[1].keys()
            if contents[0][at] == contents[1][at] and any(at in area for area in inherited)
        }
        kept = {Reason.COW, Reason.INHERITED}
        for task, reasons in ((parent, {Reason.COW}), (child, kept)):
            before_fork = task.sharing.cow.before_fork
            here = pages_of(before_fork["start"], before_fork["end"] - before_fork["start"])
            runs = task.runs[np.isin(task.runs["reason"], [*reasons])]
            assert pages_of(runs["gva"], runs["size"]) | here == common
        assert 0 < len(common) < len(contents[1])


def content_of(task):
    with Sources() as sources:
        return {
            int(e["gva"]) + n * PAGE_SIZE: bytes(
                sources.of(task.memory, int(e["level"])).pages[
                    int(e["offset"]) + n * PAGE_SIZE : int(e["offset"]) + (n + 1) * PAGE_SIZE
                ]
            )
            for e in task.memory.entries
            for n in range(int(e["size"]) // PAGE_SIZE)
        }


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
        built = build_inside(plan, NO_POOL).images
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
        build_inside(make_plan(images), NO_POOL)
    assert state(dumps) == before


def test_large_pieces_are_left_to_the_agent(images, monkeypatch):
    """CRIU is not asked for them; nor does it lose one that is not large."""
    plan = make_plan(images)
    pieces = [task.pieces_of_criu for task in plan.tasks]
    sizes = [int((some["end"] - some["start"]).max()) for some in pieces if len(some)]
    if not sizes:
        pytest.skip("its pages lie in no pieces")
    largest = max(sizes)
    monkeypatch.setattr("ovr.plan.areas._LARGE", largest)
    content = build_inside(plan, NO_POOL).images
    left = 0
    for task in plan.tasks:
        large = task.large_pieces
        sizes = large["end"] - large["start"]
        assert (sizes >= largest).all()
        left += len(large)
        data = b"".join(image_chunks(content[f"mm-{task.task.pid}.img"]))
        (frame,) = frames(data, f"mm-{task.task.pid}.img")
        mm = decode(MmEntry, frame.payload, "mm")
        asked = {(vma.start, vma.end) for vma in mm.vmas if vma.madv >> MADV_POPULATE_WRITE & 1}
        rest = task.pieces_of_criu
        rest = rest[rest["end"] - rest["start"] < largest]
        assert sum(end - start for start, end in asked) == int((rest["end"] - rest["start"]).sum())
        assert not any(
            start < high and low < end for start, end in asked for low, high in large.tolist()
        )
    assert left > 0


def test_areas_of_which_criu_dumps_nothing(dumps):
    """Above 47 bits there are areas in mm.img, and no pages: whoever restores them is told."""
    with ImageSet.open(dumps / "one") as images:
        plan = make_plan(images)
        assert plan.not_dumped == {}
        first = plan.tasks[0]
        vmas = first.task.vmas.copy()
        vmas["status"][-1] = 1 | VMA_ANON_PRIVATE
        vmas["start"][-1], vmas["end"][-1] = 1 << 48, (1 << 48) + 8 * PAGE_SIZE
        high = replace(plan, tasks=(replace(first, task=replace(first.task, vmas=vmas)),))
        assert high.not_dumped == {first.task.pid: 8 * PAGE_SIZE}
