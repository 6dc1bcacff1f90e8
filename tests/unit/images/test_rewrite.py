import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr.errors import ImagesDamaged, ImagesUnsupported
from ovr.images.imageset import ImageSet
from ovr.images.pagemap import Pagemap, encode_pagemap
from ovr.images.rewrite import InsideImages, image_chunks
from ovr.images.vma import MADV_POPULATE_WRITE, split_vma
from ovr.images.wire import copy_of
from ovr.memory.extents import cut_to, ends_of, total


def content(built):
    return {name: b"".join(image_chunks(image)) for name, image in built.items()}


def write(inside, directory):
    for name, image in content(inside.build()).items():
        (directory / name).write_bytes(image)


def page_bytes(memory):
    """Page address -> its bytes."""
    return {
        gva + at: memory.files[level].read(offset + at, 4096)
        for gva, size, _, level, offset in memory.entries.tolist()
        for at in range(0, size, 4096)
    }


def test_unchanged_images_are_passed_on_byte_for_byte(dumps):
    with ImageSet.open(dumps / "tree") as images:
        built = content(InsideImages(images).build())
    assert built == {p.name: p.read_bytes() for p in (dumps / "tree").glob("*.img")}
    assert list(built) == sorted(built)


def test_parent_images_are_flattened(dumps, tmp_path):
    with ImageSet.open(dumps / "parent") as images:
        wanted = page_bytes(images.tasks[0].memory)
        write(InsideImages(images), tmp_path)
    assert not (tmp_path / "parent").exists()
    with ImageSet.open(tmp_path) as images:
        assert page_bytes(images.tasks[0].memory) == wanted


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_kept_pages(dumps, tmp_path_factory, data):
    """Any choice of pages, read back from the set that was written."""
    which = data.draw(st.sampled_from(["one", "parent"]))
    out = tmp_path_factory.mktemp("inside")
    with ImageSet.open(dumps / which) as images:
        memory = images.tasks[0].memory
        pages = sorted(page_bytes(memory))
        chosen = sorted(data.draw(st.sets(st.sampled_from(pages), min_size=1)))
        low = np.array(chosen, np.uint64)
        inside = InsideImages(images)
        inside.keep_pages(memory, cut_to(memory.entries, low, low + np.uint64(4096)))
        wanted = {page: page_bytes(memory)[page] for page in chosen}
        write(inside, out)
        assert content(inside.build()) == content(inside.build())
    with ImageSet.open(out) as images:
        again = images.tasks[0].memory
        assert page_bytes(again) == wanted
        assert again.compat == memory.compat
        assert (out / again.pages_name).stat().st_size == len(chosen) * 4096


def test_never_an_empty_pagemap(one):
    with ImageSet.open(one) as images:
        (task,) = images.tasks
        inside = InsideImages(images)
        with pytest.raises(ValueError, match="CRIU would crash"):
            inside.keep_pages(task.memory, task.memory.entries[:0])
        (shared,) = images.shared.values()
        inside.keep_pages(shared, shared.entries[:0])
        assert content(inside.build())[shared.pages_name] == b""
    empty = Pagemap(task.memory.pages_id, task.memory.entries[:0], task.memory.compat)
    (one / task.memory.name).write_bytes(encode_pagemap(empty, task.memory.name))
    with ImageSet.open(one) as images, pytest.raises(ImagesUnsupported, match="no pages at all"):
        InsideImages(images).build()


def test_pages_that_are_not_there_cannot_be_kept(one):
    with ImageSet.open(one) as images:
        memory = images.tasks[0].memory
        more = memory.entries.copy()
        more["size"][-1] += 4096
        with pytest.raises(ValueError, match="not in pagemap-1001"):
            InsideImages(images).keep_pages(memory, more)


def test_split_areas_and_neutral_umask(one, tmp_path):
    (tmp_path / "out").mkdir()
    with ImageSet.open(one) as images:
        (task,) = images.tasks
        mm, fs = copy_of(task.mm), copy_of(task.fs)
        at = [v.start for v in mm.vmas].index(0x100000000)
        pieces = split_vma(mm.vmas[at], [0x100000000 + i * 4096 for i in range(1, 16)])
        for piece in pieces[::2]:
            piece.madv |= 1 << MADV_POPULATE_WRITE
        vmas = [*list(mm.vmas)[:at], *pieces, *list(mm.vmas)[at + 1 :]]
        del mm.vmas[:]
        mm.vmas.extend(vmas)
        fs.ClearField("umask")
        inside = InsideImages(images)
        inside.replace("mm-1001.img", mm)
        inside.replace("fs-1001.img", fs)
        write(inside, tmp_path / "out")
        assert task.umask == 0o137  # the original is untouched
    with ImageSet.open(tmp_path / "out") as images:
        (again,) = images.tasks
    assert len(again.vmas) == len(task.vmas) + 15
    assert total(again.memory.entries) == total(task.memory.entries)
    assert again.umask is None
    assert np.count_nonzero(again.vmas["madv"] & (1 << MADV_POPULATE_WRITE)) == 8


def test_file_offsets_follow_a_split(one):
    with ImageSet.open(one) as images:
        mapped = next(v for v in images.tasks[0].mm.vmas if v.start == 0x100200000)
        stack = next(v for v in images.tasks[0].mm.vmas if v.start == 0x100400000)
        vdso = next(v for v in images.tasks[0].mm.vmas if v.status & 8)
    low, high = split_vma(mapped, [0x100203000])
    assert (low.start, low.end, low.pgoff) == (0x100200000, 0x100203000, 0)
    assert (high.start, high.end, high.pgoff) == (0x100203000, 0x100204000, 0x3000)
    assert high.shmid == mapped.shmid and mapped.end == 0x100204000
    for whole in (stack, vdso):
        assert split_vma(whole, []) == [whole]
        with pytest.raises(ValueError, match="must stay whole"):
            split_vma(whole, [whole.start + 4096])
    for cuts in ([mapped.start], [mapped.end], [0x100201001], [0x100202000, 0x100201000]):
        with pytest.raises(ValueError, match="cannot cut"):
            split_vma(mapped, cuts)


def test_images_that_are_not_messages_cannot_be_replaced(one):
    with ImageSet.open(one) as images:
        for name in ("pages-1.img", "pagemap-1001.img"):
            with pytest.raises(ValueError, match="contains more than messages"):
                InsideImages(images).replace(name)


def test_memory_images_of_an_earlier_dump_stay_behind(one):
    """CRIU does not clear the directory that it dumps into."""
    with ImageSet.open(one) as images:
        memory = images.tasks[0].memory
    (one / "pagemap-999.img").write_bytes((one / memory.name).read_bytes())
    (one / "pages-7.img").write_bytes(bytes(4096))
    with ImageSet.open(one) as images:
        assert images.memories[0].name == memory.name
        built = InsideImages(images).build()
    assert "pagemap-999.img" not in built and "pages-7.img" not in built
    assert memory.name in built and memory.pages_name in built


def all_kept(images):
    """The first task's memory, and its pages image if all of its pages are kept."""
    memory = images.tasks[0].memory
    inside = InsideImages(images)
    inside.keep_pages(memory, memory.entries)
    return memory, inside.build()[memory.pages_name]


def test_images_that_shrink_while_they_are_sent(one):
    with ImageSet.open(one) as images:
        memory, pages = all_kept(images)
        os.truncate(one / memory.pages_name, 4096)
        with pytest.raises(ImagesDamaged, match="shrank while it was read"):
            list(image_chunks(pages))


def test_neighbouring_runs_are_read_in_one_piece(one):
    with ImageSet.open(one) as images:
        memory, pages = all_kept(images)
    assert [(at, size) for _, at, size in pages.slices] == [
        (0, (one / memory.pages_name).stat().st_size)
    ]
    assert pages.size == int((ends_of(memory.entries) - memory.entries["gva"]).sum())
