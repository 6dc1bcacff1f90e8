"""Trees that share memory, restored in a model of CRIU: every task sees its own content again.

The model does page by page what criu/mem.c and its restorer do with areas and pages, and what the
kernel does with frames; the plan's wishes are the real ones.
"""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ovr.images.cow import ImageContents
from ovr.images.vma import (
    MADV_DONTNEED_LOCKED,
    MADV_POPULATE_WRITE,
    MAP_GROWSDOWN,
    MAP_POPULATE,
    PROT_READ,
    PROT_WRITE,
    VMA_ANON_PRIVATE,
)
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.ranges import RANGE, join, no_ranges
from ovr.plan import areas as plan_areas
from ovr.plan import sharing
from ovr.plan.areas import cuts_of, plan_tasks
from ovr.plan.inside import mark_piece
from ovr.plan.pages import Reason
from tests.unit.images.test_cow import task

ANON = (1 | VMA_ANON_PRIVATE, 0x22, 0)
STACK = (1 | VMA_ANON_PRIVATE, 0x22 | MAP_GROWSDOWN, 0)
ZERO = 0
AREAS = [(0, 24, ANON), (24, 40, ANON), (50, 58, STACK), (60, 70, ANON)]
LAST = 69  # where each task has a page of its own, as all real ones do


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(sharing, "_SMALLEST", 2 * PAGE_SIZE)


def pages_of(ranges):
    return {
        page
        for start, end in ranges.tolist()
        for page in range(start // PAGE_SIZE, end // PAGE_SIZE)
    }


class Guest:
    """Frames and who maps them."""

    def __init__(self):
        self.content = []
        self.maps = {}

    def new(self, content=ZERO):
        self.content.append(content)
        return len(self.content) - 1

    def write_fault(self, pid, page):
        """The page is the task's own afterwards: do_anonymous_page(), do_wp_page()."""
        frame = self.maps[pid].get(page)
        if frame is None:
            self.maps[pid][page] = self.new()
        elif self.users()[frame] > 1:
            self.maps[pid][page] = self.new(self.content[frame])

    def users(self):
        return Counter(frame for pages in self.maps.values() for frame in pages.values())


def pieces(one, cuts):
    for first, end, (status, flags, _) in one.areas:
        bounds = first * PAGE_SIZE, end * PAGE_SIZE
        edges = [bounds[0], *cuts.get(bounds, ()), bounds[1]]
        for low, high in pairwise(edges):
            yield SimpleNamespace(start=low, end=high, status=status, flags=flags, madv=0)


def build(guest, plans, asked):
    """Build the tree as CRIU does before its hook."""
    kept = {p.task.pid: {page for run in p.runs[p.runs["reason"] > Reason.INHERITED]
                         for page in pages_of(join(np.array(
                             [(run["gva"], run["gva"] + run["size"])], RANGE)))}
            for p in plans}  # fmt: skip
    for plan in plans:
        pid, parent = plan.task.pid, plan.task.ppid
        mine = guest.maps[pid] = dict(guest.maps.get(parent, {}))
        for piece in asked[pid] if not parent else ():
            if piece.flags & MAP_POPULATE:
                for page in range(piece.start // PAGE_SIZE, piece.end // PAGE_SIZE):
                    mine[page] = guest.new()
        for page in kept[pid]:
            content = plan.task.contents[page]
            if guest.content[mine[page]] != content if page in mine else content != ZERO:
                mine[page] = guest.new(content)
        for page in kept.get(parent, set()) - kept[pid]:
            mine.pop(page, None)
    for plan in plans:
        pid = plan.task.pid
        for piece in asked[pid]:
            for page in range(piece.start // PAGE_SIZE, piece.end // PAGE_SIZE):
                if piece.madv >> MADV_POPULATE_WRITE & 1:
                    guest.write_fault(pid, page)
                if piece.madv >> MADV_DONTNEED_LOCKED & 1:
                    guest.maps[pid].pop(page, None)


def write(guest, plans):
    """Restore from outside: touch, write shared pages, write the rest."""
    written = set()
    for plan in plans:
        for page in pages_of(plan.to_touch()):
            guest.write_fault(plan.task.pid, page)
    for plan in plans:
        for page in pages_of(plan.sharing.cow.before_fork):
            frame = guest.maps[plan.task.pid][page]
            assert frame not in written
            written.add(frame)
            guest.content[frame] = plan.task.contents[page]
    for plan in plans:
        pid = plan.task.pid
        for root, ranges in plan.sharing.from_root.items():
            for page in pages_of(ranges):
                assert guest.maps[pid][page] == guest.maps[root][page]
        alone = pages_of(plan.pieces_of_criu) | pages_of(plan.to_touch())
        for page in alone:
            frame = guest.maps[pid][page]
            assert guest.users()[frame] == 1
            guest.content[frame] = plan.task.contents[page]


CONTENTS = st.dictionaries(st.integers(0, 68), st.integers(0, 2), max_size=60)
CHANGES = st.dictionaries(st.integers(0, 68), st.sampled_from([None, 0, 1, 2, 3]), max_size=12)


@st.composite
def families(draw):
    contents = [draw(CONTENTS)]
    parents = [0]
    for number in range(2, draw(st.integers(3, 6))):
        parents.append(draw(st.integers(1, number - 1)))
        pages = dict(contents[parents[-1] - 1])
        for page, byte in draw(CHANGES).items():
            pages[page] = byte
        contents.append({page: byte for page, byte in pages.items() if byte is not None})
    inside = {page for first, end, _ in AREAS for page in range(first, end)}
    real = draw(st.booleans())
    return parents, [
        {p: b for p, b in pages.items() if p in inside} | ({LAST: 10 + number} if real else {})
        for number, pages in enumerate(contents)
    ]


ZEROS_FOR_ONES = ([0, 1, 1], [{0: 1, 1: 0, 69: 10}, {0: 1, 1: 0, 69: 11}, {0: 0, 1: 0, 69: 12}])
NOTHING_ELSE = ([0, 1, 1], [{0: 1, 1: 1}, {0: 1, 1: 1}, {0: 0, 1: 0}])


@settings(max_examples=200)
@given(family=families())
@example(family=ZEROS_FOR_ONES)  # zeros, where an ancestor's page is written later
@example(family=NOTHING_ELSE)
def test_every_task_sees_its_own_content(tmp_path_factory, family):
    parents, contents = family
    path = tmp_path_factory.mktemp("images")
    tasks = []
    for number, (parent, pages) in enumerate(zip(parents, contents, strict=True), 1):
        one = task(path, number, parent, AREAS, pages)
        one.vmas["prot"] = PROT_READ | PROT_WRITE
        one.areas, one.contents, one.rseq_areas = AREAS, pages, no_ranges()
        tasks.append(one)
    plans, cow = plan_tasks(tasks, ImageContents(), asked=True, force=True)
    cuts = cuts_of(plans, cow)
    asked = {plan.task.pid: [*pieces(plan.task, cuts[plan.task.pid])] for plan in plans}
    bounds = [[(piece.start, piece.end) for piece in asked[plan.task.pid]] for plan in plans]
    assert all(one == bounds[0] for one in bounds)  # or CRIU would see no inheritance
    for plan in plans:
        for piece in asked[plan.task.pid]:
            mark_piece(piece, plan, large_by_criu=False)
            assert not (piece.flags & MAP_GROWSDOWN and piece.flags & MAP_POPULATE)
    guest = Guest()
    build(guest, plans, asked)
    write(guest, plans)
    for plan in plans:
        mapped = guest.maps[plan.task.pid]
        for page, content in plan.task.contents.items():
            assert (guest.content[mapped[page]] if page in mapped else ZERO) == content
        for page in mapped.keys() - plan.task.contents.keys():
            assert guest.content[mapped[page]] == ZERO


def test_the_page_that_criu_must_have_is_none_that_is_shared(tmp_path):
    """CRIU takes a page that is in the parent's images alone away from the children."""
    areas = [(0, 100, ANON), (200, 210, ANON)]
    common = {2: 1, 3: 1}
    own = range(200, 205)
    tasks = [
        task(tmp_path, pid, pid - 1, areas, common | dict.fromkeys(own, pid)) for pid in (1, 2)
    ]
    for one in tasks:
        one.vmas["prot"] = PROT_READ | PROT_WRITE
        one.rseq_areas = no_ranges()
    plans, _ = plan_tasks(tasks, ImageContents(), asked=True, force=True)
    for plan in plans:
        [anchor] = plan.runs[plan.runs["reason"] == Reason.ANCHOR].tolist()
        assert anchor[:2] == (200 * PAGE_SIZE, PAGE_SIZE)


def test_a_server_and_its_workers(tmp_path):
    """Pages equal in all tasks are not in the images; changed ones are the task's own."""
    areas = [(0, 100, ANON), (200, 210, ANON)]
    common = {page: 1 + page % 3 for page in range(100)} | {205: 9}
    tasks = [task(tmp_path, 1, 0, areas, common)]
    tasks += [task(tmp_path, pid, 1, areas, common | {pid: 7}) for pid in range(2, 22)]
    for one in tasks:
        one.vmas["prot"] = PROT_READ | PROT_WRITE
        one.rseq_areas = no_ranges()
    plans, _ = plan_tasks(tasks, ImageContents(), asked=True, force=True)
    first, *workers = plans
    assert pages_of(first.sharing.cow.before_fork) == {*range(100)}
    for worker in workers:
        assert pages_of(worker.sharing.from_root[1]) == {*range(100)} - {worker.task.pid}
        assert pages_of(worker.to_touch()) == {worker.task.pid}
        assert worker.by_reason()[Reason.COW] == PAGE_SIZE
    assert plan_areas.pieces_of(first.outside)[0]["size"].sum() == 100 * PAGE_SIZE
