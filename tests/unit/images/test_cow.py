"""Pages that CRIU leaves shared, against a page-by-page model of criu/mem.c; and equal_pages."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovr._fastcopy import PAIR, equal_pages
from ovr.images.cow import ImageContents, inheritance
from ovr.images.pagemap import PAGEMAP_DTYPE
from ovr.images.task import Memory
from ovr.images.vma import MAP_GROWSDOWN, VMA_ANON_PRIVATE, VMA_DTYPE, VMA_FILE_PRIVATE
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.ranges import ranges_of

REGULAR = 1
ANON = (REGULAR | VMA_ANON_PRIVATE, 0x22, 0)
STACK = (REGULAR | VMA_ANON_PRIVATE, 0x22 | MAP_GROWSDOWN, 0)
FILE, OTHER_FILE = (REGULAR | VMA_FILE_PRIVATE, 2, 5), (REGULAR | VMA_FILE_PRIVATE, 2, 6)


class PagesFile:
    """Stands for an `ImageFile`."""

    base = 0

    def __init__(self, path, content):
        self.path = path
        self.size = len(content)
        path.write_bytes(content)

    def open(self):
        return os.open(self.path, os.O_RDONLY)


def task(directory, pid, ppid, areas, contents, *, exe=1):
    """A task with `areas` (first page, end page, kind), and a byte for each page it has."""
    vmas = np.zeros(len(areas), VMA_DTYPE)
    for row, (first, end, (status, flags, shmid)) in zip(vmas, areas, strict=True):
        row["start"], row["end"] = first * PAGE_SIZE, end * PAGE_SIZE
        row["status"], row["flags"], row["shmid"] = status, flags, shmid
    entries, pages = [], b""
    for page, byte in sorted(contents.items()):
        entries.append((page * PAGE_SIZE, PAGE_SIZE, 4, 0, len(pages)))
        pages += bytes([byte]) * PAGE_SIZE
    file = PagesFile(directory / f"pages-{pid}.img", pages)
    table = np.array(entries, PAGEMAP_DTYPE)
    memory = Memory(f"pagemap-{pid}.img", pid, False, table, (file,))
    mm = SimpleNamespace(exe_file_id=exe)
    return SimpleNamespace(pid=pid, ppid=ppid, vmas=vmas, memory=memory, mm=mm)


def pages_of(ranges):
    return {
        page
        for start, end in ranges.tolist()
        for page in range(start // PAGE_SIZE, end // PAGE_SIZE)
    }


def equal_of(parent, child):
    return pages_of(inheritance([parent, child], ImageContents())[child.pid].equal)


@pytest.mark.parametrize(
    ("areas", "exe", "shared"),
    [
        ([(10, 20, ANON)], 1, {10, 12}),
        ([(10, 20, ANON)], 2, set()),
        ([(10, 21, ANON)], 1, set()),
        ([(9, 20, ANON)], 1, set()),
        ([(10, 20, STACK)], 1, set()),
        ([(10, 20, FILE)], 1, set()),
    ],
)
def test_areas_must_be_alike(tmp_path, areas, exe, shared):
    parent = task(tmp_path, 1, 0, [(10, 20, ANON)], {10: 1, 11: 2, 12: 3, 13: 4})
    child = task(tmp_path, 2, 1, areas, {10: 1, 11: 9, 12: 3, 14: 4}, exe=exe)
    assert equal_of(parent, child) == shared
    assert len(inheritance([parent, child], ImageContents())[2].areas) == bool(shared)


@pytest.mark.parametrize(("theirs", "shared"), [(FILE, {3}), (OTHER_FILE, set())])
def test_mappings_of_one_file(tmp_path, theirs, shared):
    parent = task(tmp_path, 1, 0, [(0, 5, FILE)], {3: 1})
    child = task(tmp_path, 2, 1, [(0, 5, theirs)], {3: 1})
    assert equal_of(parent, child) == shared


CONTENTS = st.dictionaries(st.integers(0, 29), st.integers(0, 2), min_size=1)
AREAS = [(0, 10, ANON), (10, 16, FILE), (20, 30, STACK)]


@given(contents=st.lists(CONTENTS, min_size=2, max_size=4), fathers=st.lists(st.integers(1, 3)))
def test_generations(tmp_path_factory, contents, fathers):
    """Pages equal in a task and its parent, whichever other tasks have them."""
    path = tmp_path_factory.mktemp("images")
    inside = {page for first, end, _ in AREAS for page in range(first, end)}
    contents = [{p: b for p, b in pages.items() if p in inside} or {0: 0} for pages in contents]
    parents = [0, *(min(pid, dict(enumerate(fathers)).get(pid, 1)) for pid in range(1, 4))]
    tasks = [task(path, n + 1, parents[n], AREAS, pages) for n, pages in enumerate(contents)]
    found = inheritance(tasks, ImageContents())
    assert found.keys() == {*range(2, len(tasks) + 1)}
    for n, pages in enumerate(contents[1:], 1):
        theirs = contents[parents[n] - 1]
        common = {page for page in pages.keys() & theirs.keys() if pages[page] == theirs[page]}
        assert pages_of(found[n + 1].equal) == common


def test_zero_pages(tmp_path):
    one = task(tmp_path, 1, 0, [(0, 30, ANON)], {0: 0, 1: 0, 2: 5, 7: 0, 9: 1, 12: 0})
    ranges = ranges_of(*(np.array(pages, "<u8") * PAGE_SIZE for pages in ([1, 5], [4, 12])))
    assert pages_of(ImageContents().zeros(one, ranges)) == {1, 7}
    assert len(ImageContents().zeros(one, ranges[:0])) == 0


def pairs(*rows):
    return np.array(list(rows), dtype=PAIR)


def test_equal_pages():
    one = b"a" * PAGE_SIZE + b"b" * PAGE_SIZE + b"c" * PAGE_SIZE
    other = b"b" * PAGE_SIZE + b"c" * (PAGE_SIZE - 1) + b"d"
    assert equal_pages(one, other, pairs((PAGE_SIZE, 0, 2 * PAGE_SIZE))).tolist() == [True, False]
    both = pairs((0, 0, PAGE_SIZE), (PAGE_SIZE, 0, PAGE_SIZE))
    assert equal_pages(one, other, both).tolist() == [False, True]
    assert equal_pages(one, other, pairs()).tolist() == []


@pytest.mark.parametrize(
    "row",
    [(0, 0, 100), (0, 0, 0), (-4096, 0, 4096), (0, 8192, 4096), (4096, 0, 4096), (0, 0, 1 << 63)],
)
def test_equal_pages_stays_within_its_sources(row):
    with pytest.raises(ValueError, match=r"whole pages|past the end"):
        equal_pages(bytes(PAGE_SIZE), bytes(2 * PAGE_SIZE), pairs(row))
