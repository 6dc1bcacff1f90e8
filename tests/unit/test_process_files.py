"""A process that poses as QEMU cannot make `ovr` write to files that it may not write to itself."""

import ctypes
import errno
import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ovr.errors import CheckFailed, OvrError, RamNotShared
from ovr.memory.addresses import Gpa
from ovr.memory.ram import GuestRam
from ovr.vm import process_files
from ovr.vm.memory_map import guest_slots
from ovr.vm.qmp import Qmp
from tests.unit.false_qemu import NOBODY, SIZE, become, false_qemu, mapped, unmap

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root's rights are what is at stake")

OURS = b"root's own".ljust(SIZE, b".")
PRIVATE = mmap.MAP_PRIVATE


@pytest.fixture
def place():
    """A directory that everybody may write to, with a file that only root may write to."""
    path = Path(tempfile.mkdtemp(prefix="ovr-test-", dir="/var/tmp"))
    path.chmod(0o777)
    (path / "victim").write_bytes(OURS)
    (path / "victim").chmod(0o644)
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["duplicated", "opened"])
def way(request, monkeypatch):
    """How descriptors are taken over: ``pidfd_getfd``, or where the kernel refuses that."""
    if request.param == "opened":

        def refused(*_):
            ctypes.set_errno(errno.EPERM)
            return -1

        monkeypatch.setattr(
            process_files.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(syscall=refused)
        )
    return request.param


def attack(path, data=b"overwritten"):
    """Write to "guest RAM", as a restore would."""
    with (
        Qmp.connect(path / "qmp") as qmp,
        GuestRam(guest_slots(qmp), writable=True, unheld=True) as ram,
    ):
        ram.write(Gpa(0), data)


def refused(place, play, words):
    """Attack a process that plays QEMU in this way, in vain."""
    with false_qemu(place / "qmp", play), pytest.raises(RamNotShared, match=words):
        attack(place)


def opened(path, mode=os.O_RDWR | os.O_CREAT):
    fd = os.open(path, mode, 0o644)
    if mode & os.O_CREAT:
        os.ftruncate(fd, SIZE)
    return fd


def test_what_it_may_write_to_itself_is_written_to(place, way):
    def play(qemu):
        become(NOBODY)
        qemu.address = mapped(opened(place / "own"))

    with false_qemu(place / "qmp", play):
        attack(place)
    assert (place / "own").read_bytes().startswith(b"overwritten")


@pytest.mark.parametrize(
    ("kind", "prot", "words"),
    [
        (mmap.MAP_SHARED, mmap.PROT_READ, "may not write"),
        (PRIVATE, mmap.PROT_READ, "private mapping"),
        (PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, "private mapping"),
    ],
)
def test_a_file_that_it_can_only_read(place, way, kind, prot, words):
    def play(qemu):
        become(NOBODY)
        qemu.address = mapped(opened(place / "victim", os.O_RDONLY), kind=kind, prot=prot)

    refused(place, play, words)
    assert (place / "victim").read_bytes() == OURS


def test_a_descriptor_for_reading_only(place, way):
    """It had the file open for writing once, and has it mapped; then only its own word counts."""

    def play(qemu):
        become(NOBODY)
        fd = opened(place / "own")
        qemu.address = mapped(fd)
        opened(place / "own", os.O_RDONLY)
        os.close(fd)

    refused(place, play, "open for reading only")


def swapping(place):
    """What has its own file open until it is signalled, then the victim by the same number."""

    def play(qemu):
        become(NOBODY)
        victim, kept = opened(place / "victim", os.O_RDONLY), opened(place / "own")
        (place / "own").unlink()
        own = os.dup(kept)
        qemu.address = mapped(own)
        numbers = [victim, kept]

        def swap():
            os.dup2(numbers[0], own)
            numbers.reverse()

        qemu.signalled = swap

    return play


def test_descriptors_that_are_swapped_after_the_look(place, way):
    with false_qemu(place / "qmp", swapping(place)) as pid, Qmp.connect(place / "qmp") as qmp:
        slots = guest_slots(qmp)
        os.kill(pid, signal.SIGUSR1)
        while files_of(pid).count(place / "victim") != 2:
            time.sleep(0.001)
        with GuestRam(slots, writable=True, unheld=True) as ram:
            ram.write(Gpa(0), b"overwritten")
    assert (place / "victim").read_bytes() == OURS


def files_of(pid):
    return [entry.readlink() for entry in Path(f"/proc/{pid}/fd").iterdir()]


def test_descriptors_that_are_swapped_all_the_time(place, way):
    """Whatever is seen in between, what is written to is its own file, or nothing."""
    with false_qemu(place / "qmp", swapping(place)) as pid:
        ended = []
        for _ in range(100):
            os.kill(pid, signal.SIGUSR1)
            try:
                attack(place)
            except OvrError as error:
                ended.append(error)
        assert len(ended) < 100
    assert (place / "victim").read_bytes() == OURS


def test_a_mapping_that_is_another_one_by_then(place, monkeypatch):
    """What it maps is looked at again after its file was opened."""

    def play(qemu):
        become(NOBODY)
        own, victim = opened(place / "own"), opened(place / "victim", os.O_RDONLY)
        qemu.address = mapped(own)

        def remap():
            libc = ctypes.CDLL(None)
            libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3)
            shared_there = mmap.MAP_SHARED | 0x10  # MAP_FIXED
            libc.mmap(qemu.address, SIZE, mmap.PROT_READ, shared_there, victim, 0)

        qemu.signalled = remap

    with false_qemu(place / "qmp", play) as pid:
        open_mapped = process_files.ProcessFiles.open_mapped

        def then(self, mapping):
            file = open_mapped(self, mapping)
            os.kill(pid, signal.SIGUSR1)
            while f" {place}/own" in Path(f"/proc/{pid}/maps").read_text():
                time.sleep(0.001)
            return file

        monkeypatch.setattr(process_files.ProcessFiles, "open_mapped", then)
        with pytest.raises(CheckFailed, match="may not write"):
            attack(place)


@pytest.mark.parametrize("claimed", [2 * SIZE, SIZE + 4096])
def test_more_than_its_file_has(place, way, claimed):
    def play(qemu):
        become(NOBODY)
        qemu.size = claimed
        qemu.address = mapped(opened(place / "own"), size=2 * SIZE)

    with (
        false_qemu(place / "qmp", play),
        Qmp.connect(place / "qmp") as qmp,
        pytest.raises(RamNotShared, match=f"has {SIZE} bytes, but QEMU uses {claimed}"),
    ):
        guest_slots(qmp)


def hole(qemu, place):
    """A mapping that ends before what is said to be RAM does."""
    qemu.size = 2 * SIZE
    qemu.address = mapped(opened(place / "own"), size=2 * SIZE)
    unmap(qemu.address + SIZE, SIZE)


def anonymous(qemu, _):
    qemu.address = mapped(-1, kind=PRIVATE | mmap.MAP_ANONYMOUS)


@pytest.mark.parametrize("what", [hole, anonymous])
def test_an_address_where_something_else_is_mapped(place, way, what):
    def play(qemu):
        become(NOBODY)
        what(qemu, place)

    refused(place, play, "not mapped from a file")


def test_what_is_no_file(place):
    """A packet socket's ring is mapped shared and writable, and has an inode."""
    solid, ring = 263, 5  # SOL_PACKET, PACKET_RX_RING

    def play(qemu):
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        packets.setsockopt(solid, ring, struct.pack("=4I", SIZE, 1, 2048, SIZE // 2048))
        qemu.address = mapped(packets.detach())

    refused(place, play, "no regular file")


def test_a_pid_that_is_another_users_by_now(place):
    """As after a set-uid program was run, or when root has got the pid of who listened."""

    def play(qemu):
        qemu.address = mapped(opened(place / "victim", os.O_RDWR))
        become(NOBODY, saved=0)
        qemu.listening = become_root

    def become_root():
        os.setresuid(0, 0, 0)

    with (
        false_qemu(place / "qmp", play) as pid,
        pytest.raises(CheckFailed, match=rf"process {pid} .* user {NOBODY}: .* as user 0"),
    ):
        attack(place)
    assert (place / "victim").read_bytes() == OURS


def test_a_qemu_that_gives_up_root(place):
    """``-run-with user=…``: it listens as root, and runs as another user."""

    def play(qemu):
        qemu.address = mapped(opened(place / "own"))
        qemu.listening = lambda: become(NOBODY)

    with false_qemu(place / "qmp", play):
        attack(place)
    assert (place / "own").read_bytes().startswith(b"overwritten")


def mounted(place, kind):
    """Mount a file system of this kind below `place`; None where that cannot be done."""
    where = place / "mounted"
    where.mkdir()
    if kind == "overlay":
        for name in ("lower", "upper", "work"):
            (place / name).mkdir()
        options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
        words = ["mount", "-t", "overlay", "overlay", "-o", options, where]
    elif kind == "btrfs":
        with (place / "image").open("wb") as image:
            image.truncate(128 << 20)
        if shutil.which("mkfs.btrfs") is None:
            return None
        subprocess.run(["mkfs.btrfs", "-q", place / "image"], check=True)
        words = ["mount", "-o", "loop", place / "image", where]
    else:
        words = ["mount", "-t", kind, "ovr-test", where]
    return None if subprocess.run(words, check=False, capture_output=True).returncode else where


@pytest.mark.parametrize("kind", ["tmpfs", "overlay", "btrfs", "hugetlbfs"])
def test_file_systems(place, kind):
    """Some have other device numbers in /proc/PID/maps than fstat() tells."""
    if (where := mounted(place, kind)) is None:
        pytest.skip(f"cannot mount {kind} here")
    try:
        path, size = where / "ram", SIZE
        if kind == "btrfs":  # a file of the same number in another subvolume
            for name in "ab":
                subprocess.run(["btrfs", "-q", "subvolume", "create", where / name], check=True)
                (where / name / "ram").write_bytes(bytes(size))
            path = where / "b" / "ram"
        if kind == "hugetlbfs":
            size = os.statvfs(where).f_bsize
            pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{size >> 10}kB/free_hugepages")
            if not int(pool.read_text()):
                pytest.skip("no huge pages are free")

        def play(qemu):
            if kind == "btrfs":
                mapped(os.open(where / "a" / "ram", os.O_RDWR))
            fd = os.open(path, os.O_RDWR | os.O_CREAT)
            os.ftruncate(fd, size)
            qemu.size, qemu.address = size, mapped(fd, size=size)

        with false_qemu(place / "qmp", play):
            attack(place)
        if kind == "hugetlbfs":
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=1) as found:
                assert found[:11] == b"overwritten"
        else:
            assert path.read_bytes().startswith(b"overwritten")
    finally:
        subprocess.run(["umount", where], check=True)
