"""Copying and comparing pages of a machine that runs: what is done in a hold, and what is not."""

import mmap
import os
import pty
import termios
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ovr._fastcopy import OWNED, PIECE, RUN
from ovr.attempt import in_holds as copying
from ovr.attempt.copier import Copier
from ovr.attempt.journal import Journal
from ovr.attempt.targets import Target
from ovr.errors import VerifyMismatch
from ovr.images.source import Source, _without_waiting
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.ram import GuestRam
from ovr.vm.hold import Holder
from tests.unit.machine_process import (
    RAM_BYTES,
    Monitor,
    RunningMachine,
    eventually,
    run_script,
)

BEGIN = 1 << 20  # of what is copied: the machine itself uses the first pages
SIZE = RAM_BYTES - BEGIN


class Space:
    """Every page of the RAM file where its address says."""

    def __init__(self, ram):
        self.ram = ram

    def walk(self, pieces, frames=None):
        runs = np.zeros(len(pieces), dtype=RUN)
        for name in ("gva", "size", "offset"):
            runs[name] = pieces[name]
        runs["gpa"] = pieces["gva"]
        runs["flags"] = OWNED
        runs["page_shift"] = 12
        return runs


@pytest.fixture
def machine(tmp_path):
    machine = RunningMachine(tmp_path, threads=3)
    yield machine
    machine.close()


@pytest.fixture(params=["disk", "memory"])
def source(request):
    # Where reading can be made not to wait, and where it cannot.
    directory = Path(__file__).parents[2] / "build" if request.param == "disk" else Path("/dev/shm")
    directory.mkdir(exist_ok=True)
    path = directory / f"ovr-test-source-{os.getpid()}"
    path.write_bytes(os.urandom(SIZE))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    nowait = _without_waiting(fd, 0)
    if nowait != (request.param == "disk"):
        pytest.skip(f"{directory} is on a file system that is not what it is tried for")
    with mmap.mmap(fd, SIZE, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as pages:
        yield Source("pages-1.img", pages, fd, 0, nowait)
    os.close(fd)
    path.unlink()


@contextmanager
def copier(machine, source, advance=lambda count: None, holder_class=Holder):
    with (
        GuestRam([machine.slot], writable=True) as ram,
        holder_class(Monitor(machine.pid), ram=ram) as holder,
        ThreadPoolExecutor(2) as pool,
    ):
        target = Target(
            "pid 1", Space(ram), None, np.array([(BEGIN, SIZE, 0)], PIECE), source,
            ask=lambda pieces: None, check=lambda: None,
        )  # fmt: skip
        yield Copier(holder, pool, 2, Journal(), advance), target


def content(machine):
    with machine.path.open("rb") as file:
        file.seek(BEGIN)
        return file.read()


def forget(source):
    """As a host does whose memory is short."""
    os.posix_fadvise(source.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def test_who_is_told_how_far_it_is_may_wait(machine, source, monkeypatch):
    """Ctrl-S on a terminal, a callback of the Python API: the VM runs meanwhile."""
    monkeypatch.setattr(copying, "HOLD_BYTES", 1 << 20)
    told = []

    def advance(count):
        assert machine.runs
        told.append(count)

    with copier(machine, source, advance) as (ours, target):
        ours.write([(target, target.pieces)])
        assert len(told) > 1 and sum(told) == SIZE
        assert ours.holder.count >= len(told)
        (entry,) = ours.journal.memory
        assert entry.bytes == SIZE
    assert content(machine) == bytes(source.pages)


class Forgetful(Holder):
    """Drops an image from the page cache when the VM is held, as often as it is told to."""

    times = 0
    source = None

    @contextmanager
    def held(self):
        with super().held():
            if self.times:
                self.times -= 1
                forget(self.source)
            yield


@pytest.fixture
def reads(machine, monkeypatch):
    """Whether each read of an image's file was made in a hold, and whether it might wait."""
    seen = []
    for name in ("copy_in", "review"):
        real = getattr(GuestRam, name)

        def spied(ram, *args, real=real, wait=True):
            seen.append((machine.states() <= {"t", "T"}, wait))
            return real(ram, *args, wait=wait)

        monkeypatch.setattr(GuestRam, name, spied)
    return seen


@pytest.mark.parametrize("times", [1, 1000], ids=["once", "always"])
@pytest.mark.parametrize("work", ["copy", "verify"])
def test_nothing_is_read_from_disk_in_a_hold(machine, source, reads, work, times):
    """Pages that are dropped at the worst moment are read ahead once more, or set aside."""
    with copier(machine, source, holder_class=Forgetful) as (ours, target):
        if work == "verify":
            ours.write([(target, target.pieces)])
        ours.holder.source, ours.holder.times = source, times
        holds = ours.holder.count
        forget(source)
        if work == "verify":
            assert ours.verify([target], "full") == SIZE
        else:
            ours.write([(target, target.pieces)])
        # Without waiting, pages not in the page cache are left for another hold; a source that must
        # be waited for is in memory before.
        assert ours.holder.count - holds > (1 if source.nowait else 0)
    assert bool(reads) == source.nowait
    assert all(held and not wait for held, wait in reads)
    assert content(machine) == bytes(source.pages)


def test_a_page_that_differs(machine, source):
    with copier(machine, source) as (ours, target):
        ours.write([(target, target.pieces)])
        at = BEGIN + 77 * PAGE_SIZE
        with ours.holder.held():
            target.space.ram.write(at + 9, bytes([target.space.ram.read(at + 9, 1)[0] ^ 1]))
        with pytest.raises(VerifyMismatch, match=f"{at:#x}"):
            ours.verify([target], "full")


def test_a_copy_that_does_not_wait(machine, source):
    """It gives back what was not there, instead of having the VM wait for a disk."""
    if not source.nowait:
        pytest.skip("this file system cannot do that")
    runs = np.array([(BEGIN, BEGIN, SIZE, 0, OWNED, 12)], RUN)
    with GuestRam([machine.slot], writable=True, unheld=True) as ram:
        forget(source)
        assert ram.copy_in(runs, source.fd, 0, SIZE, wait=False) < SIZE
        forget(source)
        assert ram.copy_in(runs, source.fd, 0, SIZE) == SIZE
        forget(source)
        compared, differs = ram.review(runs, source.fd, 0, SIZE, wait=False)
        assert compared < SIZE and differs is None
        forget(source)
        assert ram.review(runs, source.fd, 0, SIZE) == (SIZE, None)


def test_whether_reading_can_be_made_not_to_wait():
    fd = os.memfd_create("ovr-test")  # tmpfs: it may have to be swapped in
    os.write(fd, b"x")
    assert not _without_waiting(fd, 0)
    os.close(fd)


ON_A_TERMINAL = """
import numpy as np
from concurrent.futures import ThreadPoolExecutor
from ovr._fastcopy import PIECE
from ovr.memory.addresses import Gpa, Offset
from ovr.cli.progress import BarWatch
from ovr.images.source import Source
from ovr.attempt.journal import Journal
from ovr.memory.ram import Slot
from ovr.attempt import in_holds as copying
from ovr.attempt.copier import Copier
from ovr.attempt.targets import Target
from tests.unit.machine import ram_file
from tests.unit.test_copier import BEGIN, SIZE, Space

copying.HOLD_BYTES = 1 << 20
source = os.memfd_create("source")
os.truncate(source, SIZE)
image = Source("pages-1.img", memoryview(bytes(SIZE)), source, 0)
times = iter(range(1000000))
watch = BarWatch(sys.stderr, lambda: next(times))
done = 0

def advance(count):
    global done
    done += count
    watch.advance(done, SIZE)

ram = GuestRam([Slot(Gpa(0), BEGIN + SIZE, ram_file(sys.argv[2]), Offset(0))], writable=True)
with Holder(Monitor(pid), ram=ram) as holder, ThreadPoolExecutor(2) as pool:
    target = Target("pid 1", Space(ram), None, np.array([(BEGIN, SIZE, 0)], PIECE), image,
                    ask=None, check=lambda: None)
    print("begins", flush=True)
    Copier(holder, pool, 2, Journal(), advance).write([(target, target.pieces)])
print(done, flush=True)
"""


def test_ctrl_s(machine):
    """The bar is not drawn any more; the VM runs."""
    leader, follower = pty.openpty()
    termios.tcflow(follower, termios.TCOOFF)
    process = run_script(ON_A_TERMINAL, machine.pid, machine.path, stderr=follower)
    try:
        assert process.stdout.readline() == "begins\n"
        call = Path(f"/proc/{process.pid}/syscall")  # write(2, ...)
        assert eventually(lambda: call.read_text().startswith("1 0x2 ")), "it does not wait"
        for _ in range(20):
            assert not {"t", "T"} & machine.states()
        assert process.poll() is None
        termios.tcflow(follower, termios.TCOON)
        assert process.stdout.readline() == f"{SIZE}\n"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
        os.close(leader)
        os.close(follower)
