"""Pages of zeros in pages images: marked when they are copied, holes of the file in the end."""

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from ovr._fastcopy import OWNED, RUN
from ovr.attempt import sink as sinks
from ovr.attempt.sink import Sink
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.ram import GuestRam
from tests.unit.machine_process import RAM_BYTES, RunningMachine
from tests.unit.test_copier import BEGIN, SIZE
from tests.unit.test_saver import Delay, content, saved, saver

PAGES = SIZE // PAGE_SIZE
FEW, MANY = range(3, 5), range(100, 200)
"""Pages with zeros only: less than a hole of a file on a disk, and more."""
NEARLY = (50, 51)
"""A page that has zeros but for its last byte, and one but for its first."""


@pytest.fixture
def machine(tmp_path) -> Iterator[RunningMachine]:
    machine = RunningMachine(tmp_path, threads=3)
    data = np.frombuffer(bytearray(os.urandom(SIZE)), np.uint8).reshape(PAGES, PAGE_SIZE)
    data[[*FEW, *MANY, *NEARLY]] = 0
    data[NEARLY[0], -1] = data[NEARLY[1], 0] = 1
    with machine.path.open("r+b") as file, mmap.mmap(file.fileno(), RAM_BYTES) as ram:
        ram[BEGIN:] = data.tobytes()
    yield machine
    machine.close()


@pytest.fixture(params=["disk", "memory"])
def sink(request, tmp_path) -> Iterator[Sink]:
    with ExitStack() as stack:
        if request.param == "disk":
            path = Path(__file__).parents[2] / "build" / f"ovr-test-holes-{os.getpid()}"
            path.parent.mkdir(exist_ok=True)
            stack.callback(path.unlink)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        else:
            fd = os.memfd_create("ovr-test-holes")
        one = stack.enter_context(Sink(fd, "pages-1.img", PAGE_SIZE))
        if one.nowait != (request.param == "memory"):
            pytest.skip("build/ is in memory")
        one.resize(SIZE)
        one.allocate()
        yield one


def space(sink: Sink) -> int:
    os.fsync(sink.fd)
    return os.fstat(sink.fd).st_blocks * 512


def test_the_file_gets_holes(machine, sink):
    with saver(machine, sink, Delay()) as (ours, target):
        ours.save([target])
    assert np.flatnonzero(sink.zero).tolist() == [*FEW, *MANY]
    before = space(sink)
    assert before >= SIZE
    sink.make_holes()
    holes = len(MANY) + (len(FEW) if sink.nowait else 0)
    # A disk may give space in larger units.
    least = holes * PAGE_SIZE if sink.nowait else holes * PAGE_SIZE * 3 // 4
    assert before - space(sink) >= least
    assert saved(sink) == content(machine)
    assert os.fstat(sink.fd).st_size == SIZE


def test_a_file_system_without_holes(machine, sink, monkeypatch, caplog):
    def fail(*_: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(sinks, "punch_hole", fail)
    with saver(machine, sink, Delay()) as (ours, target), caplog.at_level("INFO", "ovr.dump"):
        ours.save([target])
        sink.make_holes()
    assert "pages-1.img" in caplog.text
    assert saved(sink) == content(machine)


def test_nothing_is_punched_without_zeros(sink, monkeypatch):
    def fail(*_: int) -> None:
        raise AssertionError

    monkeypatch.setattr(sinks, "punch_hole", fail)
    sink.make_holes()


def test_marks_are_for_whole_pages(machine):
    whole = (BEGIN, BEGIN, PAGE_SIZE, 0, OWNED, 12)
    target, marks = bytearray(2 * PAGE_SIZE), np.zeros(1, np.uint8)
    with GuestRam([machine.slot]) as ram:
        for wrong in (
            [(BEGIN, BEGIN + 8, PAGE_SIZE, 0, OWNED, 12)],
            [(BEGIN, BEGIN, PAGE_SIZE + 8, 0, OWNED, 12)],
            [whole, whole],
        ):
            with pytest.raises(ValueError, match=r"parts of pages|1 marks for 2"):
                ram.copy_to(np.array(wrong, RUN), target, marks)
        marks[0] = 1
        assert ram.copy_to(np.array([whole], RUN), target, marks) == PAGE_SIZE
    assert not marks[0]
