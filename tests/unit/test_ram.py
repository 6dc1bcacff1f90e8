"""Slots, bounds, copy and compare."""

import errno
import os
import re
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovr._fastcopy import RUN, RamMap, in_page_cache
from ovr.errors import GuestFault, RamNotShared
from ovr.memory.addresses import PAGE_SIZE, Gpa, Offset
from ovr.memory.ram import GuestRam, RamFile, Slot
from tests.sources import as_file
from tests.unit.machine import Machine, ram_file


@pytest.fixture
def machine(tmp_path):
    machine = Machine.build(tmp_path, sizes=(1 << 20, 1 << 20))
    yield machine
    machine.ram.close()


def run(gpa, size, offset, gva=0):
    return (gva, gpa, size, offset, 0, 12)


def runs(*rows):
    return np.array(list(rows), dtype=RUN)


def test_slots_map_to_their_files(machine):
    second = machine.ram.slots[1]
    assert second.gpa == 3 << 20
    machine.ram.write(Gpa(second.gpa + 5), b"hello")
    with Path(second.file.name).open("rb") as file:
        file.seek(second.offset + 5)
        assert file.read(5) == b"hello"


@pytest.mark.parametrize("gpa", [(1 << 20) - 4, 1 << 20, 2 << 20, 4 << 20, (1 << 64) - 4])
def test_nothing_lands_in_a_hole(machine, gpa):
    before = [machine.ram.read(slot.gpa, slot.size) for slot in machine.ram.slots]
    with pytest.raises(GuestFault):
        machine.ram.write(Gpa(gpa), b"12345678")
    with pytest.raises(GuestFault):
        machine.ram.read(Gpa(gpa), 8)
    assert [machine.ram.read(slot.gpa, slot.size) for slot in machine.ram.slots] == before


def test_adjacent_slots_are_one_memory(tmp_path):
    slots = []
    for number in range(2):
        path = tmp_path / str(number)
        path.write_bytes(bytes(PAGE_SIZE))
        slots.append(Slot(Gpa(number * PAGE_SIZE), PAGE_SIZE, ram_file(path), Offset(0)))
    with GuestRam(slots[::-1], writable=True, unheld=True) as ram:
        data = os.urandom(PAGE_SIZE)
        ram.copy_in(runs(run(2048, PAGE_SIZE, 0)), *as_file(data))
        assert ram.read(Gpa(2048), PAGE_SIZE) == data
        assert ram.first_difference(runs(run(2048, PAGE_SIZE, 0)), data) is None
        ram.write(Gpa(PAGE_SIZE - 2), b"abcd")
        assert ram.read(Gpa(PAGE_SIZE - 2), 4) == b"abcd"


def test_a_read_only_map_cannot_write(machine):
    with GuestRam(machine.ram.slots) as ram:
        with pytest.raises(PermissionError):
            ram.write(Gpa(0), b"x")
        with pytest.raises(PermissionError):
            ram.copy_in(runs(run(0, 1, 0)), *as_file(b"x"))


@pytest.mark.parametrize(
    "bad",
    [
        run(0, PAGE_SIZE, 1),  # past the end of the source
        run(0, PAGE_SIZE, -1),
        run(0, 2 * PAGE_SIZE, 0),
        run(0, 1 << 63, 0),
        run(0, PAGE_SIZE, (1 << 63) - 1),
    ],
)
def test_a_bad_source_range_copies_nothing(machine, bad):
    with pytest.raises((ValueError, GuestFault)):
        machine.ram.copy_in(runs(run(PAGE_SIZE, 16, 0), bad), *as_file(b"\xff" * PAGE_SIZE))
    assert machine.ram.read(Gpa(PAGE_SIZE), 16) == bytes(16)


def test_a_run_outside_of_ram_copies_nothing(machine):
    with pytest.raises(GuestFault):
        machine.ram.copy_in(runs(run(0, 16, 0), run((1 << 20) - 8, 16, 0)), *as_file(b"\xff" * 16))
    assert machine.ram.read(Gpa(0), 16) == bytes(16)


def test_first_difference_names_the_page(machine):
    data = os.urandom(4 * PAGE_SIZE)
    rows = runs(run(0, 4 * PAGE_SIZE, 0, gva=0x7000_0000))
    machine.ram.copy_in(rows, *as_file(data))
    assert machine.ram.first_difference(rows, data) is None
    machine.ram.write(Gpa(2 * PAGE_SIZE + 77), bytes([data[2 * PAGE_SIZE + 77] ^ 1]))
    assert machine.ram.first_difference(rows, data) == 0x7000_0000 + 2 * PAGE_SIZE


page_runs = st.lists(
    st.tuples(st.integers(0, 255), st.integers(0, 63), st.integers(1, 5)), max_size=20
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=page_runs)
def test_copy_agrees_with_a_plain_one(tmp_path_factory, rows):
    machine = Machine.build(tmp_path_factory.mktemp("ram"), sizes=(1 << 20,))
    machine.ram.write(Gpa(0), bytes(1 << 20))
    source = os.urandom(70 * PAGE_SIZE)
    model = bytearray(1 << 20)
    native = []
    for page, start, count in rows:
        size = min(count, 256 - page) * PAGE_SIZE
        gpa, offset = page * PAGE_SIZE, start * PAGE_SIZE
        native.append(run(gpa, size, offset))
        model[gpa : gpa + size] = source[offset : offset + size]
    machine.ram.prefault(runs(*native))
    assert machine.ram.copy_in(runs(*native), *as_file(source)) == sum(r[2] for r in native)
    assert machine.ram.read(Gpa(0), 1 << 20) == bytes(model)
    machine.ram.close()


class FileStatus(NamedTuple):
    st_size: int
    st_blksize: int


def mapped(path):
    """How many bytes of a file are in this process's page tables."""
    parts = Path("/proc/self/smaps").read_text().split("VmFlags:")
    rss = [re.search(r"^Rss: +(\d+)", part, re.M)[1] for part in parts if f" {path}\n" in part]
    return sum(map(int, rss)) << 10


@pytest.mark.parametrize("block", [4096, 2 << 20])
def test_single_pages_are_mapped_ahead_of_the_copy(tmp_path, monkeypatch, block):
    """Scattered as they are; the last of the slot, too, and some that were looked at before.

    Where a file's pages should be huge, all of 2 MiB: whether they are huge or not.
    """
    path, size = tmp_path / "ram", 4 << 20
    path.write_bytes(os.urandom(size + (1 << 20)))
    slot = Slot(Gpa(0), size, ram_file(path), Offset(1 << 20))
    status = os.fstat
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda fd: FileStatus(status(fd).st_size, block))
        ram = GuestRam([slot], writable=True, unheld=True)
    assert mapped(path) == 0
    pages = [*range(0, 1024, 37), 1023]
    ram.prefault(runs(*(run(page * PAGE_SIZE, PAGE_SIZE, 0) for page in pages)))
    before = mapped(path)
    assert before == size if block > 4096 else len(pages) * PAGE_SIZE <= before < size
    ram.prefault(runs(*(run(page * PAGE_SIZE, PAGE_SIZE, 0) for page in reversed(pages))))
    ram.prefault(runs(run(1020 * PAGE_SIZE, 4 * PAGE_SIZE, 0), run(1 << 40, PAGE_SIZE, 0)))
    assert mapped(path) >= before
    ram.prefault(runs(run(0, size, 0)))
    assert mapped(path) == size
    ram.close()


def test_find_looks_at_allocated_memory_only(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of hole: a full scan would not end
    with GuestRam(
        [Slot(Gpa(0), 1 << 40, ram_file(path), Offset(0))], writable=True, unheld=True
    ) as ram:
        ram.write(Gpa(5 << 30), b"needle here, needle there")
        ram.write(Gpa((7 << 30) + PAGE_SIZE), b"needle")
        assert list(ram.find(b"needle")) == [
            5 << 30,
            (5 << 30) + 13,
            (7 << 30) + PAGE_SIZE,
        ]
        assert list(ram.find(b"needle", step=PAGE_SIZE)) == [5 << 30, (7 << 30) + PAGE_SIZE]
        assert path.stat().st_blocks * 512 < 1 << 20


def test_short_files_and_such_as_may_only_be_read(tmp_path):
    short = tmp_path / "short"
    short.write_bytes(b"x")
    with pytest.raises(RamNotShared, match="inside its RAM file"):
        GuestRam([Slot(Gpa(0), PAGE_SIZE, ram_file(short), Offset(0))])
    with pytest.raises(RamNotShared):
        GuestRam([])
    (tmp_path / "ram").write_bytes(bytes(PAGE_SIZE))
    slot = Slot(Gpa(0), PAGE_SIZE, ram_file(tmp_path / "ram", os.O_RDONLY), Offset(0))
    with GuestRam([slot]) as ram:
        assert ram.read(Gpa(0), 8) == bytes(8)
    with pytest.raises(RamNotShared, match="cannot be mapped"):
        GuestRam([slot], writable=True)


def test_a_search_leaves_the_file_offset_where_it_is(tmp_path):
    """It is QEMU's own: the descriptor is one of its open file description."""
    path = tmp_path / "ram"
    path.write_bytes(b"needle".ljust(4 * PAGE_SIZE))
    file = ram_file(path)
    os.lseek(file.fileno(), 123, os.SEEK_SET)
    with GuestRam([Slot(Gpa(0), 4 * PAGE_SIZE, file, Offset(0))]) as ram:
        assert list(ram.find(b"needle")) == [0]
    assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 123


def test_slots_must_not_overlap(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(bytes(4 * PAGE_SIZE))
    slots = [
        Slot(Gpa(0), 2 * PAGE_SIZE, ram_file(path), Offset(0)),
        Slot(Gpa(PAGE_SIZE), PAGE_SIZE, ram_file(path), Offset(0)),
    ]
    with pytest.raises(ValueError, match="overlap"):
        GuestRam(slots)


def test_a_closed_map_has_no_memory(machine):
    machine.ram.close()
    with pytest.raises(GuestFault):
        machine.ram.read(Gpa(0), 1)


def test_close_waits_for_nobody_but_refuses_while_used(tmp_path):
    size = 512 << 20
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(size)
    with path.open("rb") as file:
        ram = RamMap([(0, size, file.fileno(), 0)], writable=False)
    started, refused = threading.Event(), threading.Event()

    def search():
        started.set()
        while not refused.is_set():
            ram.find(0, size, b"nothing like it", 1)

    thread = threading.Thread(target=search)
    thread.start()
    started.wait()
    for _ in range(10_000):
        try:
            ram.close()
        except BufferError:
            refused.set()
            break
        else:
            break
    busy = refused.is_set()
    refused.set()
    thread.join()
    assert busy


def test_what_is_in_the_page_cache(tmp_path):
    path = tmp_path / "pages"
    path.write_bytes(bytes(4 * PAGE_SIZE))
    with path.open("rb") as file:
        assert in_page_cache(file.fileno(), 1, 4 * PAGE_SIZE - 1)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert not in_page_cache(file.fileno(), 0, PAGE_SIZE)
        for offset, size in ((0, 0), (-1, 1), (0, -1)):
            with pytest.raises(ValueError):
                in_page_cache(file.fileno(), offset, size)


def test_a_read_error_is_not_called_a_file_that_was_cut_off(tmp_path):
    """The kernel says EIO of an address of /proc/PID/mem where nothing is mapped."""
    path = tmp_path / "ram"
    path.write_bytes(bytes(PAGE_SIZE))
    slot = Slot(Gpa(0), PAGE_SIZE, ram_file(path), Offset(0))
    with (
        Path("/proc/self/mem").open("rb") as source,
        GuestRam([slot], writable=True, unheld=True) as ram,
        pytest.raises(OSError, match="Input/output error") as caught,
    ):
        ram.copy_in(runs(run(0, PAGE_SIZE, 0)), source.fileno(), 0, PAGE_SIZE)
    assert caught.value.errno == errno.EIO


@pytest.fixture
def huge_file():
    """A file of two huge pages, as QEMU has with ``memory-backend-memfd,hugetlb=on``."""
    pages = Path("/proc/sys/vm/nr_hugepages")
    before = int(pages.read_text())
    try:
        pages.write_text(str(before + 2))
    except OSError:
        pytest.skip("only root can reserve huge pages")
    flags = os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB
    file = RamFile(os.memfd_create("huge-ram", flags), "huge-ram")
    try:
        os.ftruncate(file.fileno(), 4 << 20)
        try:
            os.posix_fallocate(file.fileno(), 0, 4 << 20)
        except OSError:
            pytest.skip("this host has no two huge pages")
        yield file
    finally:
        pages.write_text(str(before))


def test_slots_of_small_pages_in_huge_ones(huge_file):
    """Firmware makes parts of the RAM below 1 MiB read-only, which are left out."""
    slots = [
        Slot(Gpa(0), 0xC3000, huge_file, Offset(0)),
        Slot(Gpa(0xE8000), 0x8000, huge_file, Offset(0xE8000)),
        Slot(Gpa(0x100000), 0x300000, huge_file, Offset(0x100000)),
    ]
    mappings = Path("/proc/self/maps").read_text().count("memfd:huge-ram")
    with GuestRam(slots, writable=True, unheld=True) as ram:
        for gpa in (0, 0xC2FF8, 0xE8000, 0x100000, 0x3FFFF8):
            ram.write(Gpa(gpa), gpa.to_bytes(8, "little"))
            assert os.pread(huge_file.fileno(), 8, gpa) == gpa.to_bytes(8, "little")
        for gpa in (0xC3000, 0xE7FF8, 0xF0000, 0x400000):
            with pytest.raises(GuestFault):
                ram.write(Gpa(gpa), bytes(8))
        ram.prefault(runs(run(0xE8000, PAGE_SIZE, 0), run(0x100000, 0x300000, 0)))
        assert list(ram.find((0x3FFFF8).to_bytes(8, "little"), step=8)) == [0x3FFFF8]
    assert Path("/proc/self/maps").read_text().count("memfd:huge-ram") == mappings
