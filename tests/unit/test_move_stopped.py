"""The stopped tree of a move: what is looked up, compared and written on the host is bounded."""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from ovr._fastcopy import PIECE, RUN
from ovr.attempt.targets import Target
from ovr.errors import ImagesDamaged, ImagesUnsupported
from ovr.guest.protocol import MAX_IMAGE_BYTES
from ovr.images import PAGEMAP_DTYPE
from ovr.images.vma import VMA_DTYPE
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.extents import total
from ovr.memory.ranges import RANGE
from ovr.move import stopped as stopped_module
from ovr.move.stopped import Stopped, look_at_stopped, pages_there
from ovr.plan import Warm
from ovr.plan.pages import PLACED, Reason
from tests.unit.images.test_cow import task


class Space:
    """Pages at the frames that it is told; notes how many bytes are looked up at once."""

    def __init__(self, shift, looks):
        self.shift, self.looks = shift, looks

    def walk(self, pieces):
        self.looks.append(total(pieces))
        runs = np.zeros(len(pieces), RUN)
        for name in ("gva", "size", "offset"):
            runs[name] = pieces[name]
        runs["gpa"] = pieces["gva"] + np.uint64(self.shift)
        return runs


class Holder:
    holds = 0

    @contextmanager
    def held(self):
        self.holds += 1
        yield


def target(memory, space):
    return Target(
        memory.name, space, None, np.empty(0, PIECE), None, ask=lambda pieces: None,
        check=lambda: None,
    )  # fmt: skip


def stopped_with(tmp_path, tasks, looks, saver=None, origins=()):
    targets = {
        one.memory.name: target(one.memory, Space(shift, looks)) for one, shift in tasks.items()
    }
    attempt = SimpleNamespace(holder=Holder(), saver=saver)
    return Stopped(attempt, {}, tmp_path, targets, dict(origins))


class Task(SimpleNamespace):
    __hash__ = object.__hash__


def task_with(tmp_path, pid, pages):
    made = task(tmp_path, pid, pid - 1, [], dict.fromkeys(pages, 1))
    return Task(**vars(made))


def areas(*bounds):
    found = np.zeros(len(bounds), VMA_DTYPE)
    for row, (start, end) in zip(found, bounds, strict=True):
        row["start"], row["end"] = start * PAGE_SIZE, end * PAGE_SIZE
    return found


def test_only_pages_that_both_have_are_looked_up_and_few_at_once(tmp_path, monkeypatch):
    """Areas may be as large as the address space, and page tables lead anywhere."""
    monkeypatch.setattr(stopped_module, "_WALKED_AT_ONCE", 2 * PAGE_SIZE)
    parent = task_with(tmp_path, 1, range(10, 15))
    child = task_with(tmp_path, 2, range(11, 18))
    looks = []
    ours = stopped_with(tmp_path, {parent: 0, child: 0}, looks)
    found = ours.equal(child.memory, parent.memory, areas((0, 14), (14, 1 << 35)))
    assert found.tolist() == [(11 * PAGE_SIZE, 15 * PAGE_SIZE)]
    assert looks == [2 * PAGE_SIZE] * 4 and ours.attempt.holder.holds == 2
    elsewhere = stopped_with(tmp_path, {parent: 0, child: PAGE_SIZE}, looks)
    assert not len(elsewhere.equal(child.memory, parent.memory, areas((0, 1 << 35))))
    assert not len(ours.equal(child.memory, parent.memory, areas((0, 11), (17, 20))))


class Saver:
    """Writes pages of which every third has content; notes how many bytes there are on the host."""

    def __init__(self, path, seen):
        self.path, self.seen = path, seen

    def save(self, targets):
        [one] = targets
        with self.path.open("r+b") as file:
            for piece in one.pieces:
                for at in range(int(piece["offset"]), int(piece["offset"] + piece["size"]), 4096):
                    byte = b"\1" if at // PAGE_SIZE % 3 == 0 else b"\0"
                    os.pwrite(file.fileno(), byte * PAGE_SIZE, at)
        self.seen.append(self.path.stat().st_blocks * 512)


def test_pages_are_compared_with_zeros_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(stopped_module, "_SAVED_AT_ONCE", 64 << 10)
    one = task_with(tmp_path, 1, range(100, 200))
    path = tmp_path / "pages-1.img"
    path.write_bytes(b"")
    os.truncate(path, 100 * PAGE_SIZE)
    seen = []
    ours = stopped_with(tmp_path, {one: 0}, [], lambda advance: Saver(path, seen))
    ranges = np.array([(110 * PAGE_SIZE, 300 * PAGE_SIZE)], RANGE)
    found = ours.zeros(one, ranges)
    pages = {at // PAGE_SIZE for start, end in found.tolist() for at in range(start, end, 4096)}
    assert pages == {page for page in range(110, 200) if (page - 100) % 3}
    assert len(seen) == 6 and max(seen) <= 64 << 10
    assert path.stat().st_blocks == 0
    assert not len(ours.zeros(one, ranges[:0]))


def plan_of(*sizes):
    memories = []
    for number, size in enumerate(sizes):
        runs = np.zeros(2, PLACED)
        runs["size"] = size, 1 << 40
        runs["reason"] = Reason.READ_ONLY, Reason.OUTSIDE
        memory = SimpleNamespace(name=f"pagemap-{number}.img", pages_name=f"pages-{number}.img")
        memories.append(SimpleNamespace(memory=memory, runs=runs))
    return SimpleNamespace(memories=memories)


def test_more_inside_than_the_destination_takes_is_not_written(tmp_path):
    """A hostile source could fill the memory of the host, where other VMs have their RAM."""
    ours = stopped_with(tmp_path, {}, [])
    half = MAX_IMAGE_BYTES // 2
    ours.save_inside(plan_of(half, half))
    with pytest.raises(ImagesUnsupported):
        ours.save_inside(plan_of(half, half + PAGE_SIZE))


def test_more_memory_than_a_guest_can_have(monkeypatch):
    entries = np.array([(0, 17 << 30, 4, 0, 0)], PAGEMAP_DTYPE)
    one = SimpleNamespace(name="pagemap-7.img", pagemap=SimpleNamespace(entries=entries))
    monkeypatch.setattr(stopped_module, "rseq_pages", lambda names, images: {})
    monkeypatch.setattr(stopped_module, "dumped_pages", lambda names, images: [one])
    attempt = SimpleNamespace(vm=SimpleNamespace(ram=SimpleNamespace(size=1 << 30)))
    with pytest.raises(ImagesDamaged):
        look_at_stopped(attempt, SimpleNamespace(names=[]), None, None, None)


def test_a_task_without_pages_has_none_in_the_pool(tmp_path):
    one, other = task_with(tmp_path, 1, [4]), task_with(tmp_path, 2, [])
    kept = np.array([(0, 1 << 21)], RANGE)
    origin = object()
    ours = stopped_with(tmp_path, {}, [], origins={one.memory.name: origin})
    ours = Stopped(ours.attempt, {1: kept[:1]}, tmp_path, {}, {one.memory.name: origin})
    memory = Warm(b"", (), 0, 0, {1: kept, 2: kept[:0]})
    plan = SimpleNamespace(
        tasks=[SimpleNamespace(task=task, memory=task.memory) for task in (one, other)]
    )
    built = SimpleNamespace(memory=memory, complete=True)
    [(found, pages)] = pages_there(plan, built, ours).items()
    assert found is origin and pages.tolist() == kept.tolist()
    assert not pages_there(plan, SimpleNamespace(memory=memory, complete=False), ours)
