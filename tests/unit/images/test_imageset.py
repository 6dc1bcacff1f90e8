import os
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovr.errors import ImagesDamaged, ImagesUnsupported, UsageError
from ovr.images import messages, objects
from ovr.images.framing import encode, image_bytes
from ovr.images.imageset import ImageSet
from ovr.images.messages import CoreEntry, FsEntry, InventoryEntry, MmEntry, PstreeEntry
from ovr.images.pagemap import Pagemap, encode_pagemap
from ovr.images.task import TaskState
from ovr.images.vma import VMA_AREA_GUARD, VMA_AREA_REGULAR, VMA_AREA_VDSO, VMA_AREA_VVAR, vma_array
from ovr.images.wire import copy_of

KINDS = {
    "core": messages.CoreEntry,
    "fdinfo": objects.FdinfoEntry,
    "files": objects.FileEntry,
    "fs": messages.FsEntry,
    "ids": messages.IdsEntry,
    "inventory": messages.InventoryEntry,
    "ipcns-var": objects.IpcVarEntry,
    "memfd": objects.MemfdInodeEntry,
    "mm": messages.MmEntry,
    "pstree": messages.PstreeEntry,
    "timens": objects.TimensEntry,
    "utsns": objects.UtsnsEntry,
}
CRIT_ENUMS = {"X86_64": 1, "NATIVE": 1, "NO_LSM": 0, "APPARMOR": 2, "disabled": 0} | {
    "REG": 1, "PIPE": 2, "EVENTFD": 6, "SIGNALFD": 9, "MEMFD": 18,
}  # fmt: skip


def kind_of(name):
    return KINDS.get(re.sub(r"(-\d+)?\.img$", "", name))


def replace(directory, name, *entries):
    (directory / name).write_bytes(image_bytes(name, map(encode, entries)))


def load(directory, name, kind):
    with ImageSet.open(directory) as images:
        return copy_of(images.entries(name, kind)[0])


def same_as_crit(ours, theirs, path):
    """Compare a message with crit's dictionary; returns the number of values compared."""
    if isinstance(theirs, dict):
        return sum(same_as_crit(getattr(ours, k), v, f"{path}.{k}") for k, v in theirs.items())
    if isinstance(theirs, list):
        assert len(ours) == len(theirs), path
        return sum(same_as_crit(o, t, path) for o, t in zip(ours, theirs, strict=True))
    if isinstance(theirs, str):
        theirs = CRIT_ENUMS[theirs] if isinstance(ours, int) else theirs.encode()
    assert ours == theirs, path
    return 1


def test_every_field_agrees_with_crit(dumps, crit):
    compared = 0
    for path, entries in crit.items():
        directory, name = path.split("/")
        if kind := kind_of(name):
            with ImageSet.open(dumps / directory) as images:
                ours = images.entries(name, kind)
            assert len(ours) == len(entries)
            for mine, theirs in zip(ours, entries, strict=True):
                compared += same_as_crit(mine, theirs, path)
    assert compared > 4000


def test_pagemaps_agree_with_crit(dumps, crit):
    with ImageSet.open(dumps / "tree") as images:
        for memory in images.memories:
            head, *entries = crit[f"tree/{memory.name}"]
            assert memory.pages_id == head["pages_id"]
            assert memory.entries["gva"].tolist() == [e["vaddr"] for e in entries]
            if memory.compat:  # this crit does not know the field that CRIU 4.2 counts in
                assert memory.entries["size"].tolist() == [e["nr_pages"] * 4096 for e in entries]
            total = int(memory.entries["size"].sum())
            assert (dumps / "tree" / memory.pages_name).stat().st_size == total


def test_rewriting_is_byte_exact(dumps):
    exact = 0
    for directory in ("one", "tree", "parent", "uts"):
        with ImageSet.open(dumps / directory) as images:
            for name in images.names:
                if kind := kind_of(name):
                    made = image_bytes(name, map(encode, images.entries(name, kind)))
                    assert made == images.read(name), name
                    exact += 1
    assert exact >= 56


def test_tree(dumps):
    with ImageSet.open(dumps / "tree") as images:
        parent, child, zombie = images.tasks
    assert (parent.pid, parent.ppid, len(parent.threads)) == (2001, 0, 3)
    assert child.ppid == zombie.ppid == parent.pid and child.pgid == child.pid
    assert parent.umask == child.umask == 0o137
    assert parent.comm == "sample" and parent.alive and parent.state is TaskState.ALIVE
    names = [parent.cores[tid].thread_core.comm for tid in parent.threads[1:]]
    assert names == [b"first", b"second"]
    limit = parent.core.tc.rlimits.rlimits[7]
    assert (limit.cur, limit.max) == (123, 456)
    assert not zombie.alive and zombie.state is TaskState.DEAD and zombie.threads == (zombie.pid,)
    assert zombie.core.tc.exit_code == 7 << 8


def test_vmas_agree_with_proc_maps(dumps):
    with ImageSet.open(dumps / "one") as images:
        vmas = images.tasks[0].vmas
    lines = (dumps / "one" / "proc.maps").read_text().splitlines()
    # since Linux 6.13 there is a second vvar area, which CRIU takes together with the first
    theirs = [line.split() for line in lines if not line.endswith("[vvar_vclock]")]
    assert len(vmas) == len(theirs)
    for vma, line in zip(vmas, theirs, strict=True):
        start, end = (int(number, 16) for number in line[0].split("-"))
        vvar = line[-1] == "[vvar]"
        assert vma["start"] == start and (vma["end"] == end or vvar)
        assert "".join("rwx"[i] if vma["prot"] >> i & 1 else "-" for i in range(3)) == line[1][:3]
        assert bool(vma["status"] & VMA_AREA_VDSO) == (line[-1] == "[vdso]")
        assert bool(vma["status"] & VMA_AREA_VVAR) == vvar


def test_page_content_lies_where_the_entries_say(dumps):
    """sample.c writes the address of each word into it."""
    for directory in ("one", "parent"):
        with ImageSet.open(dumps / directory) as images:
            memory = images.tasks[0].memory
            pages = 0
            for vaddr, size, _, level, offset in memory.entries.tolist():
                if 0x100000000 <= vaddr < 0x100300000:
                    data = memory.files[level].read(offset, size)
                    assert len(data) == size
                    words = np.frombuffer(data, "<u8").reshape(-1, 512)
                    base = vaddr + np.arange(size // 4096, dtype=np.uint64)[:, None] * np.uint64(
                        4096
                    )
                    assert (words == base + np.arange(512, dtype=np.uint64)).all()
                    pages += size // 4096
            assert pages == 17


def test_parent_images_are_used(dumps):
    with ImageSet.open(dumps / "parent") as images:
        (task,) = images.tasks
    assert {0, 1} == set(task.memory.entries["level"].tolist())
    assert task.memory.files[1].label.startswith("parent/pages-")


def test_shared_memory(dumps):
    with ImageSet.open(dumps / "one") as images:
        (shared,) = images.shared.values()
        assert shared.entries["gva"].tolist() == [0]
        words = np.frombuffer(shared.files[0].read(0, 4096), "<u8")
    assert (words == 0x100300000 + np.arange(512)).all()


def test_truncated_pages_image(one):
    with ImageSet.open(one) as images:
        memory = images.tasks[0].memory
    pages = one / memory.pages_name
    size = pages.stat().st_size
    os.truncate(pages, size - 1)
    with (
        ImageSet.open(one) as images,
        pytest.raises(
            ImagesDamaged, match=f"{pages.name}: {size} bytes needed, {size - 1} present"
        ),
    ):
        assert images.tasks
    pages.unlink()
    with ImageSet.open(one) as images, pytest.raises(ImagesDamaged, match=f"{pages.name}: missing"):
        assert images.tasks


@pytest.mark.parametrize("address", [0x200000000, 0x100300000])  # nothing there; a shared area
def test_pagemap_outside_every_private_vma(one, address):
    with ImageSet.open(one) as images:
        memory = images.tasks[0].memory
    entries = memory.entries.copy()
    last = np.searchsorted(entries["gva"], address) - 1
    entries["gva"][last] = address
    made = encode_pagemap(Pagemap(memory.pages_id, entries, memory.compat), memory.name)
    (one / memory.name).write_bytes(made)
    with (
        ImageSet.open(one) as images,
        pytest.raises(ImagesDamaged, match=rf"{memory.name}: .* {address:#x} .* of task 1001"),
    ):
        assert images.tasks


def test_unknown_magic(one):
    data = bytearray((one / "files.img").read_bytes())
    data[4] ^= 0xFF
    (one / "files.img").write_bytes(data)
    with pytest.raises(ImagesUnsupported, match=r"files.img: unknown image magic 0x"):
        ImageSet.open(one)


@pytest.mark.parametrize("version", [1, 3])
def test_other_image_versions(one, version):
    inventory = load(one, "inventory.img", InventoryEntry)
    inventory.img_version = version
    replace(one, "inventory.img", inventory)
    with pytest.raises(ImagesUnsupported, match=f"image version {version}"):
        ImageSet.open(one)


@pytest.mark.parametrize(
    "name", ["core-1001.img", "mm-1001.img", "pagemap-1001.img", "inventory.img"]
)
def test_missing_images(one, name):
    (one / name).unlink()
    with pytest.raises(ImagesDamaged, match=f"{name}: missing"), ImageSet.open(one) as images:
        assert images.tasks


def test_no_images(tmp_path):
    with pytest.raises(UsageError, match="no CRIU images in this directory"):
        ImageSet.open(tmp_path)
    with pytest.raises(UsageError, match="no such directory"):
        ImageSet.open(tmp_path / "nowhere")


def test_links_and_devices_are_not_followed(one, tmp_path):
    outside = tmp_path / "secret"
    outside.write_bytes((one / "files.img").read_bytes())
    (one / "files.img").unlink()
    (one / "files.img").symlink_to(outside)
    with pytest.raises(ImagesUnsupported, match=r"files.img: not a regular file"):
        ImageSet.open(one)
    (one / "files.img").unlink()
    os.mkfifo(one / "files.img")
    with pytest.raises(ImagesUnsupported, match=r"files.img: not a regular file"):
        ImageSet.open(one)


def test_a_file_that_becomes_a_link_is_not_followed(one, tmp_path):
    with ImageSet.open(one) as images:
        (one / "pstree.img").rename(tmp_path / "elsewhere")
        (one / "pstree.img").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ImagesDamaged, match=r"pstree.img: cannot be read: Too many levels"):
            assert images.tasks


def test_monstrous_files_are_not_read(one):
    os.truncate(one / "pstree.img", 1 << 40)
    with ImageSet.open(one) as images, pytest.raises(ImagesUnsupported, match="img: 1099"):
        assert images.tasks


def test_parent_leads_nowhere_outside_or_in_a_circle(one, tmp_path):
    (one / "parent").symlink_to("gone")
    with pytest.raises(ImagesDamaged, match="which is no directory"):
        ImageSet.open(one)
    (one / "parent").unlink()
    (one / "parent").symlink_to("/")
    with pytest.raises(ImagesUnsupported, match=f"outside of {tmp_path}"):
        ImageSet.open(one)
    (one / "parent").unlink()
    (one / "parent").symlink_to("../one")
    with pytest.raises(ImagesUnsupported, match="cycle"):
        ImageSet.open(one)


def test_other_architectures(one):
    core = load(one, "core-1001.img", CoreEntry)
    core.mtype = 3
    replace(one, "core-1001.img", core)
    with ImageSet.open(one) as images, pytest.raises(ImagesUnsupported, match="aarch64"):
        assert images.tasks


def test_tree_contradictions(tree):
    with ImageSet.open(tree) as images:
        tasks = [copy_of(t) for t in images.entries("pstree.img", PstreeEntry)]
    orphan = copy_of(tasks[1])
    orphan.ppid = 77
    two_roots = copy_of(tasks[1])
    two_roots.ppid = 0
    leaderless = copy_of(tasks[0])
    leaderless.threads.remove(leaderless.pid)
    for broken, text in (
        ([tasks[0], orphan], "parent 77 of task"),
        ([tasks[0], two_roots], "parent 0 of task"),
        ([tasks[1], tasks[0]], "parent 2001 of task"),
        ([tasks[0], tasks[1], tasks[1]], "occurs twice"),
        ([leaderless], "not among its threads"),
        ([], "no tasks"),
    ):
        replace(tree, "pstree.img", *broken)
        with ImageSet.open(tree) as images, pytest.raises(ImagesDamaged, match=text):
            assert images.tasks


def test_two_pagemaps_with_one_pages_image(tree):
    with ImageSet.open(tree) as images:
        first, second, *_ = images.memories
    made = encode_pagemap(Pagemap(first.pages_id, second.entries[:1], second.compat), second.name)
    (tree / second.name).write_bytes(made)
    with ImageSet.open(tree) as images, pytest.raises(ImagesDamaged, match="same pages image as"):
        assert images.memories


def test_vma_contradictions(one):
    mm = load(one, "mm-1001.img", MmEntry)
    good = list(mm.vmas)
    guard = copy_of(good[2])
    guard.status = VMA_AREA_REGULAR | VMA_AREA_GUARD
    assert len(vma_array([*good, guard], "mm")) == len(good) + 1
    empty, askew, high = copy_of(good[0]), copy_of(good[0]), copy_of(good[-1])
    empty.end = empty.start
    askew.start += 1
    high.end = 1 << 57
    for bad in (
        [good[1], good[0]],
        [good[0], good[0]],
        [good[0], guard, good[3]],
        [*good[:-1], high],
        [empty],
        [askew],
    ):
        with pytest.raises(ImagesDamaged, match=r"mm-1001.img: impossible memory area"):
            vma_array(bad, "mm-1001.img")
    with pytest.raises(ImagesDamaged, match="no memory areas"):
        vma_array([], "mm-1001.img")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_images_give_our_errors_only(tree, data):
    names = [p.name for p in sorted(tree.glob("*.img")) if not p.name.startswith("pages-")]
    path = tree / data.draw(st.sampled_from(names))
    whole = path.read_bytes()
    broken = bytearray(whole)
    where = data.draw(st.integers(0, len(whole) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=8))
    broken[where : where + len(patch)] = patch
    path.write_bytes(broken[: data.draw(st.just(len(broken)) | st.integers(0, len(broken)))])
    try:
        with ImageSet.open(tree) as images:
            assert all(task.comm is not None for task in images.tasks)
            assert images.memories
    except (ImagesDamaged, ImagesUnsupported) as error:
        assert error.hint and "\n" not in str(error) + error.hint
    finally:
        path.write_bytes(whole)


def test_fs_is_optional(one):
    (one / "fs-1001.img").unlink()
    with ImageSet.open(one) as images:
        assert images.tasks[0].umask is None
        assert images.entries("fs-1001.img", FsEntry) == ()


@pytest.mark.parametrize("what", ["tasks", "threads"])
def test_the_same_images_are_not_read_a_million_times(one, what, monkeypatch):
    """A list of ids is small, what each stands for is not: ids are looked at first."""
    entry = load(one, "pstree.img", PstreeEntry)
    if what == "threads":
        entry.threads.extend([entry.threads[-1]] * 1000)
        replace(one, "pstree.img", entry)
    else:
        replace(one, "pstree.img", *[entry] * 1000)
    with ImageSet.open(one) as images:
        read = images._core

        def core(tid, leader):
            # Whether a task is dead, and its threads garbage, is in its leader's image.
            assert leader and what == "threads"
            return read(tid, leader)

        monkeypatch.setattr(images, "_core", core)
        with pytest.raises(ImagesDamaged, match="occurs twice"):
            images.tasks  # noqa: B018
