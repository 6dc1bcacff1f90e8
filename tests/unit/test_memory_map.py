"""Golden texts of QEMU, damaged ones, and slots of files that this process really maps."""

import contextlib
import ctypes
import mmap
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovr.errors import CheckFailed, RamNotShared
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.ram import GuestRam
from ovr.vm.memory_map import guest_slots, ram_ranges
from ovr.vm.process_files import parse_maps

M, G = 1 << 20, 1 << 30

# `info mtree -f` of QEMU 7.2.22, q35, lab guests after boot; most of the I/O ranges left out.
LOW = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
  0000000000000070-0000000000000070 (prio 0, i/o): rtc-index

FlatView #1
 AS "cpu-smm-1", root: memory
 Root memory region: memory
  0000000000000000-000000001fffffff (prio 0, ram): ram0

FlatView #2
 AS "mch", root: bus master container
 AS "ICH9-LPC", root: bus master container
 Root memory region: (none)
  No rendered FlatView

FlatView #3
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 AS "cpu-memory-1", root: system
 AS "vhost-user-vsock-pci", root: bus master container
 Root memory region: system
  0000000000000000-00000000000c2fff (prio 0, ram): ram0
  00000000000c3000-00000000000e7fff (prio 0, rom): ram0 @00000000000c3000
  00000000000e8000-00000000000effff (prio 0, ram): ram0 @00000000000e8000
  00000000000f0000-00000000000fffff (prio 0, rom): ram0 @00000000000f0000
"""
HIGH = """\
  00000000b0000000-00000000bfffffff (prio 0, i/o): pcie-mmcfg-mmio
  00000000febe8000-00000000febe8fff (prio 0, i/o): virtio-pci-common-virtio-blk
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
"""
Q35_1G = LOW + "  0000000000100000-000000003fffffff (prio 0, ram): ram0 @0000000000100000\n" + HIGH
BELOW_HOLE = "  0000000000100000-000000007fffffff (prio 0, ram): ram0 @0000000000100000\n"
Q35_3G = LOW + BELOW_HOLE + HIGH + (
    "  0000000100000000-000000013fffffff (prio 0, ram): ram0 @0000000080000000\n"
)  # fmt: skip
Q35_8G = LOW + BELOW_HOLE + HIGH + (
    "  0000000100000000-000000027fffffff (prio 0, ram): ram0 @0000000080000000\n"
)  # fmt: skip
TWO_NODES = LOW + BELOW_HOLE + HIGH + (
    "  0000000100000000-000000017fffffff (prio 0, ram): ram1\n"
)  # fmt: skip
# Before the firmware ran (-S); 256 MiB and a DIMM of 128 MiB.
DIMM = """\
FlatView #0
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): ram0
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-000000000fffffff (prio 0, ram): ram0 @0000000000100000
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-0000000107ffffff (prio 0, ram): more

"""
OLD_MACHINE = DIMM.replace("ram0", "/objects/ram0")  # pc-q35-2.12
WITH_KVM = re.sub(r"(ram\): \S+.*)", r"\1 KVM", DIMM)

LOW_RANGES = [(0, 0xC3000, "ram0"), (0xE8000, 0x8000, "ram0")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (Q35_1G, [*LOW_RANGES, (M, G - M, "ram0")]),
        (Q35_3G, [*LOW_RANGES, (M, 2 * G - M, "ram0"), (4 * G, G, "ram0")]),
        (Q35_8G, [*LOW_RANGES, (M, 2 * G - M, "ram0"), (4 * G, 6 * G, "ram0")]),
        (TWO_NODES, [*LOW_RANGES, (M, 2 * G - M, "ram0"), (4 * G, 2 * G, "ram1")]),
        (DIMM, [(0, 0xC0000, "ram0"), (M, 255 * M, "ram0"), (4 * G, 128 * M, "more")]),
        (WITH_KVM, [(0, 0xC0000, "ram0"), (M, 255 * M, "ram0"), (4 * G, 128 * M, "more")]),
    ],
    ids=["1G", "3G", "8G", "NUMA", "DIMM", "KVM"],
)
def test_golden_texts(text, expected):
    for newline in ("\n", "\r\n"):  # QMP carries QEMU's carriage returns
        found = ram_ranges(text.replace("\n", newline))
        assert [(one.gpa, one.size, one.region) for one in found] == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unknown command: 'info mtree -f'",
        Q35_1G.replace('AS "memory"', 'AS "memo"'),
        DIMM.replace("0000000000100000-", "0000000000090000-"),
        "FlatView #0\n AS \"memory\", root: system\n"
        + "".join(f"  {n:013x}000-{n:013x}fff (prio 0, ram): r\n" for n in range(0, 10000, 2)),
    ],
    ids=["empty", "refused", "no view", "overlap", "too many"],
)  # fmt: skip
def test_damaged_texts(text):
    with pytest.raises(CheckFailed):
        ram_ranges(text)


def test_ranges_are_cut_to_whole_pages():
    odd = DIMM.replace("0000000000100000-000000000fffffff", "0000000000100100-000000000fffff00")
    assert [(one.gpa, one.size) for one in ram_ranges(odd)][1] == (M + PAGE_SIZE, 254 * M + 0xFE000)


@given(st.text(alphabet=st.sampled_from('0123456789abcdef- \n():@,romprio/"AS'), max_size=400))
def test_any_text_is_refused_or_makes_sense(noise):
    try:
        found = ram_ranges('FlatView #0\n AS "memory", root: system\n' + noise)
    except CheckFailed:
        return
    ends = [0] + [one.gpa + one.size for one in found]
    assert all(one.gpa >= end for one, end in zip(found, ends, strict=False))


def test_maps():
    text = (
        "7f5233fff000-7f52b3fff000 rw-s 00001000 00:27 3     /run/vm/ram/node 1 (deleted)\n"
        "7f5233000000-7f5233001000 rw-p 00000000 00:00 0 \n"
        "7fff00000000-7fff00001000 r-xp 00000000 00:00 0     [vdso]\n"
        "garbage\n"
    )
    (one,) = parse_maps(text)
    assert (one.start, one.end) == (0x7F5233FFF000, 0x7F52B3FFF000)
    assert (one.shared, one.writable, one.offset) == (True, True, 0x1000)
    assert (one.device, one.inode) == (os.makedev(0, 0x27), 3)
    assert one.path == "/run/vm/ram/node 1 (deleted)"


class FakeQmp:
    """QEMU as far as the memory map is concerned; "its" RAM is mapped by this process."""

    def __init__(self, mtree="", backends=(), addresses=(), pid=None, **answers):
        self._mtree = mtree
        self._addresses = dict(addresses)
        self.qemu_pid = os.getpid() if pid is None else pid
        self.owner = os.geteuid()
        self._answers = {
            "query-memdev": [
                {"id": name, "share": share} for name, share in dict(backends).items()
            ],
            **{key.replace("_", "-"): value for key, value in answers.items()},
        }

    def human(self, command):
        if command == "info mtree -f":
            return self._mtree
        gpa = int(command.removeprefix("gpa2hva "), 16)
        if gpa not in self._addresses:
            return f"No memory is mapped at address {gpa:#x}\r\n"
        hva = self._addresses[gpa]
        return f"Host virtual address for {gpa:#x} (ram0) is {hva:#x}\r\n"

    def execute(self, command, **_arguments):
        return self._answers[command]


class Ram:
    """A file mapped as QEMU maps guest RAM."""

    def __init__(self, fd, size, *, shared=True, offset=0):
        kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        self.map = mmap.mmap(fd, size, kind, offset=offset)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))


def view(*ranges):
    lines = ["FlatView #0", ' AS "memory", root: system']
    lines += [f"  {s:016x}-{s + n - 1:016x} (prio 0, ram): {name}" for s, n, name in ranges]
    return "\n".join(lines)


@pytest.fixture
def memfd():
    fd = os.memfd_create("memory-backend-memfd")
    os.ftruncate(fd, 64 * PAGE_SIZE)
    yield fd
    os.close(fd)


def test_memfd_split_by_the_hole(memfd):
    ram = Ram(memfd, 64 * PAGE_SIZE)
    low, high = 0, 4 * G
    qmp = FakeQmp(
        view((low, 16 * PAGE_SIZE, "ram0"), (high, 48 * PAGE_SIZE, "ram0"), (5 * G, M, "vga.vram")),
        {"ram0": True},
        {low: ram.address, high: ram.address + 16 * PAGE_SIZE},
    )
    slots = guest_slots(qmp)
    assert [(s.gpa, s.size, s.offset) for s in slots] == [
        (low, 16 * PAGE_SIZE, 0),
        (high, 48 * PAGE_SIZE, 16 * PAGE_SIZE),
    ]
    assert slots[0].file is slots[1].file
    assert slots[0].file.name == "/memfd:memory-backend-memfd (deleted)"
    ram.map[20 * PAGE_SIZE : 20 * PAGE_SIZE + 5] = b"hello"
    with GuestRam(slots) as guest:
        assert guest.read(high + 4 * PAGE_SIZE, 5) == b"hello"


def test_two_memfds_of_one_name_are_told_apart(memfd):
    other = os.memfd_create("memory-backend-memfd")
    os.ftruncate(other, 8 * PAGE_SIZE)
    one, two = Ram(memfd, 8 * PAGE_SIZE), Ram(other, 8 * PAGE_SIZE)
    one.map[:3], two.map[:3] = b"one", b"two"
    qmp = FakeQmp(
        view((0, 8 * PAGE_SIZE, "/objects/ram0"), (8 * PAGE_SIZE, 8 * PAGE_SIZE, "/objects/ram1")),
        {"ram0": True, "ram1": True},
        {0: one.address, 8 * PAGE_SIZE: two.address},
    )
    with GuestRam(guest_slots(qmp)) as guest:
        assert guest.read(0, 3) == b"one"
        assert guest.read(8 * PAGE_SIZE, 3) == b"two"
    os.close(other)


def one_range(ram, shared=True):
    return FakeQmp(view((0, 8 * PAGE_SIZE, "ram0")), {"ram0": shared}, {0: ram.address})


def test_a_file_is_the_one_that_is_mapped_whatever_its_name(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(bytes(9 * PAGE_SIZE))
    with path.open("r+b") as file:
        ram = Ram(file.fileno(), 8 * PAGE_SIZE, offset=PAGE_SIZE)
        (slot,) = guest_slots(one_range(ram))
        assert (slot.file.name, slot.offset) == (str(path), PAGE_SIZE)
        path.rename(tmp_path / "elsewhere")
        path.write_bytes(bytes(9 * PAGE_SIZE))  # not the VM's RAM
        (slot,) = guest_slots(one_range(ram))
        assert os.path.samestat(os.fstat(slot.file.fileno()), os.fstat(file.fileno()))
        (tmp_path / "elsewhere").unlink()
        (slot,) = guest_slots(one_range(ram))
        assert os.path.samestat(os.fstat(slot.file.fileno()), os.fstat(file.fileno()))


def test_file_gone_for_good(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(bytes(8 * PAGE_SIZE))
    with path.open("r+b") as file:
        inode = path.stat().st_ino
        ram = Ram(file.fileno(), 8 * PAGE_SIZE)
    path.unlink()
    for fd in range(3, 256):  # Python's mmap keeps a duplicate of its own
        with contextlib.suppress(OSError):
            if os.fstat(fd).st_ino == inode:
                with Path(os.devnull).open() as null:
                    os.dup2(null.fileno(), fd)
    with pytest.raises(RamNotShared, match="gone"):
        guest_slots(one_range(ram))


@pytest.mark.parametrize(
    ("backends", "words"),
    [({}, "no RAM in a memory backend"), ({"ram0": False}, "ram0 is private to QEMU")],
)
def test_plain_memory_is_refused_with_the_cure(memfd, backends, words):
    qmp = FakeQmp(view((0, 8 * PAGE_SIZE, "ram0")), backends)
    with pytest.raises(RamNotShared, match=words) as caught:
        guest_slots(qmp)
    assert "share=on" in caught.value.hint
    assert caught.value.exit_code == 4


def test_what_the_process_maps_outweighs_what_qemu_says(memfd):
    private = Ram(memfd, 8 * PAGE_SIZE, shared=False)
    with pytest.raises(RamNotShared, match="private mapping"):
        guest_slots(one_range(private))
    anonymous = Ram(-1, 8 * PAGE_SIZE, shared=False)
    with pytest.raises(RamNotShared, match="not mapped from a file"):
        guest_slots(one_range(anonymous))


def test_a_mapping_that_ends_too_early(memfd):
    ram = Ram(memfd, 8 * PAGE_SIZE)
    qmp = FakeQmp(view((0, 8 * PAGE_SIZE, "ram0")), {"ram0": True}, {0: ram.address})
    libc = ctypes.CDLL(None, use_errno=True)
    middle = ctypes.c_void_p(ram.address + 4 * PAGE_SIZE)
    assert libc.madvise(middle, PAGE_SIZE, mmap.MADV_DONTDUMP) == 0
    (slot,) = guest_slots(qmp)  # three mappings in a row, of one file: one slot
    assert (slot.size, slot.offset) == (8 * PAGE_SIZE, 0)
    assert libc.mprotect(middle, PAGE_SIZE, mmap.PROT_READ) == 0
    with pytest.raises(RamNotShared, match="may not write"):
        guest_slots(qmp)
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
    libc.mmap(ram.address + 4 * PAGE_SIZE, PAGE_SIZE, mmap.PROT_READ, fixed, -1, 0)
    with pytest.raises(RamNotShared, match="not mapped from a file"):
        guest_slots(qmp)


def test_answers_that_are_not_understood(memfd):
    with pytest.raises(CheckFailed, match="does not report"):
        guest_slots(FakeQmp(view((0, PAGE_SIZE, "ram0")), {"ram0": True}))
    with pytest.raises(CheckFailed, match="pid namespace"):
        guest_slots(FakeQmp(view((0, PAGE_SIZE, "ram0")), {"ram0": True}, pid=0))
    with pytest.raises(CheckFailed, match="cannot be read"):
        guest_slots(FakeQmp(view((0, PAGE_SIZE, "ram0")), {"ram0": True}, pid=2**22 + 1))
    with pytest.raises(RamNotShared):
        guest_slots(FakeQmp(view((0, PAGE_SIZE, "ram0")), query_memdev="what?"))
