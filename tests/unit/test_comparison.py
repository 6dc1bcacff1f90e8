"""The comparison of image sets, on recorded ones: it sees what is changed in a copy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ovr.images import CoreEntry, ImageSet, MmEntry
from ovr.images.framing import encode, image_bytes
from ovr.images.messages import InventoryEntry, PstreeEntry
from ovr.images.pagemap import Pagemap, decode_pagemap, encode_pagemap
from ovr.images.vma import VMA_ANON_PRIVATE
from ovr.images.wire import Message, copy_of
from ovr.memory.addresses import PAGE_SIZE
from tests.vm.comparison import differences


@pytest.fixture
def pair(dumps, tree) -> tuple[Path, Path]:
    """One image set, twice: with a child and a zombie. The second may be changed."""
    return dumps / "tree", tree


def rewrite(path: Path, name: str, kind: type[Message], change: Callable[[Message], None]) -> None:
    with ImageSet.open(path) as images:
        entries = [copy_of(one) for one in images.entries(name, kind)]
    for entry in entries:
        change(entry)
    (path / name).write_bytes(image_bytes(name, map(encode, entries)))


def root_of(path: Path) -> int:
    with ImageSet.open(path) as images:
        return images.tasks[0].pid


def test_alike(pair):
    assert differences(*pair) == []


def test_other_dumps_are_unlike(dumps):
    assert differences(dumps / "one", dumps / "tree")


def test_sees_a_register_and_an_area(pair):
    pid = root_of(pair[1])

    def in_core(core):
        core.thread_info.gpregs.ax ^= 1

    def in_mm(mm):
        mm.vmas[3].prot ^= 1

    rewrite(pair[1], f"core-{pid}.img", CoreEntry, in_core)
    rewrite(pair[1], f"mm-{pid}.img", MmEntry, in_mm)
    lines = differences(*pair)
    assert len(lines) == 2
    assert lines[0].startswith(f"core-{pid}.img[0] 2.2.")
    assert lines[1].startswith(f"mm-{pid}.img[0] 14.")


def test_sees_a_missing_image(pair):
    name = f"fs-{root_of(pair[1])}.img"
    (pair[1] / name).unlink()
    assert differences(*pair) == [f"only in one of them: {name}"]


def test_times_do_not_count(pair):
    def later(inventory):
        inventory.dump_uptime += 1

    rewrite(pair[1], "inventory.img", InventoryEntry, later)
    assert differences(*pair) == []


def test_threads_of_the_dead_do_not_count(pair):
    with ImageSet.open(pair[1]) as images:
        [dead] = [task.pid for task in images.tasks if not task.alive]

    def other(which: Callable[[int], bool]):
        def change(entry):
            if which(entry.pid):
                entry.threads[:] = [entry.threads[0] ^ 1] if entry.threads else [7]

        return change

    rewrite(pair[1], "pstree.img", PstreeEntry, other(lambda pid: pid == dead))
    assert differences(*pair) == []


def write_pages(path: Path, pid: int, change: Callable[[np.ndarray, np.ndarray], tuple]) -> None:
    """Change addresses and contents of a task's pages."""
    name = f"pagemap-{pid}.img"
    pagemap = decode_pagemap((path / name).read_bytes(), name)
    pages = path / f"pages-{pagemap.pages_id}.img"
    content = np.fromfile(pages, np.uint8).reshape(-1, PAGE_SIZE)
    entries = np.array(
        [
            (gva, PAGE_SIZE, flags, 0, -1)
            for start, size, flags, *_ in pagemap.entries.tolist()
            for gva in range(start, start + size, PAGE_SIZE)
        ],
        pagemap.entries.dtype,
    )
    entries, content = change(entries, content)
    content.tofile(pages)
    whole = Pagemap(pagemap.pages_id, entries, pagemap.compat)
    (path / name).write_bytes(encode_pagemap(whole, name))


def test_layout_of_pages_does_not_count(pair):
    write_pages(pair[1], root_of(pair[1]), lambda entries, content: (entries, content))
    assert differences(*pair) == []


def test_sees_a_byte(pair):
    def change(entries, content):
        content[2, 5] ^= 0x40
        return entries, content

    pid = root_of(pair[1])
    write_pages(pair[1], pid, change)
    [line] = differences(*pair)
    assert line.startswith(f"pagemap-{pid}.img: 0x")
    assert "+0x5..0x6" in line


def test_a_missing_page_counts_unless_it_is_zeros_in_anonymous_memory(pair):
    pid = root_of(pair[0])
    with ImageSet.open(pair[0]) as images:
        [task] = [one for one in images.tasks if one.pid == pid]
    anonymous = task.vmas["status"] & VMA_ANON_PRIVATE != 0

    def of(areas, entries) -> int:
        """Return the row of the first page in one of the areas."""
        rows = [
            row for row, gva in enumerate(entries["gva"].tolist())
            if ((areas["start"] <= gva) & (gva < areas["end"])).any()
        ]  # fmt: skip
        return rows[0]

    for areas, lines in ((task.vmas[anonymous], 0), (task.vmas[~anonymous], 1)):
        for path in pair:
            write_pages(
                path,
                pid,
                lambda entries, content, areas=areas: cleared(of(areas, entries), entries, content),
            )
        write_pages(
            pair[1],
            pid,
            lambda entries, content, areas=areas: without(of(areas, entries), entries, content),
        )
        assert len(differences(*pair)) == lines


def cleared(row: int, entries: np.ndarray, content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    content[row] = 0
    return entries, content


def without(row: int, entries: np.ndarray, content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.delete(entries, row), np.delete(content, row, axis=0)


def test_a_missing_page_with_content_counts(pair):
    write_pages(pair[1], root_of(pair[1]), lambda entries, content: without(
        int(np.flatnonzero(content.any(axis=1))[0]), entries, content
    ))  # fmt: skip
    [line] = differences(*pair)
    assert line.endswith("only in the first")
