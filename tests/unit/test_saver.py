"""Saving pages of a machine that runs, in holds that are broken off now and then."""

import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from ovr._fastcopy import PIECE
from ovr.attempt.saver import Saver
from ovr.attempt.sink import Sink
from ovr.attempt.targets import Target
from ovr.errors import HoldBroken
from ovr.memory.ram import GuestRam
from ovr.vm.hold import Holder
from tests.unit.machine_process import RAM_BYTES, Monitor, RunningMachine
from tests.unit.test_copier import BEGIN, SIZE, Space

BOUND = 0.05  # seconds


@pytest.fixture
def machine(tmp_path) -> Iterator[RunningMachine]:
    machine = RunningMachine(tmp_path, threads=3)
    with machine.path.open("r+b") as file, mmap.mmap(file.fileno(), RAM_BYTES) as ram:
        ram[BEGIN:] = os.urandom(SIZE)
    yield machine
    machine.close()


@pytest.fixture(params=["disk", "memory"])
def sink(request, tmp_path) -> Iterator[Sink]:
    with ExitStack() as stack:
        if request.param == "disk":
            directory = Path(__file__).parents[2] / "build"
            directory.mkdir(exist_ok=True)
            path = directory / f"ovr-test-sink-{os.getpid()}"
            stack.callback(path.unlink)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        else:
            fd = os.memfd_create("ovr-test-sink")
        yield stack.enter_context(Sink(fd, "pages-1.img", SIZE))


class Delay:
    """A check of a target that makes holds too long, as often as it is told to."""

    times = 0

    def __call__(self) -> None:
        if self.times:
            self.times -= 1
            time.sleep(4 * BOUND)


@contextmanager
def saver(machine, sink, delay):
    with (
        GuestRam([machine.slot], writable=True) as ram,
        Holder(Monitor(machine.pid), ram=ram, bound=BOUND) as holder,
        ThreadPoolExecutor(2) as pool,
    ):
        target = Target(
            "pid 1", Space(ram), None, np.array([(BEGIN, SIZE, 0)], PIECE), sink,
            ask=lambda pieces: None, check=delay,
        )  # fmt: skip
        yield Saver(holder, pool, 2, lambda count: None), target


def saved(sink: Sink) -> bytes:
    return os.pread(sink.fd, SIZE, 0)


def content(machine) -> bytes:
    with machine.path.open("rb") as file:
        file.seek(BEGIN)
        return file.read()


@pytest.mark.parametrize("times", [0, 1, 3])
def test_all_is_saved_whatever_holds_are_broken_off(machine, sink, times):
    delay = Delay()
    with saver(machine, sink, delay) as (ours, target):
        delay.times = times
        ours.save([target])
        assert ours.holder.count > times
    assert not delay.times
    assert saved(sink) == content(machine)


def test_it_gives_up_when_all_holds_are_broken_off(machine, sink):
    delay = Delay()
    with saver(machine, sink, delay) as (ours, target):
        delay.times = 1000
        with pytest.raises(HoldBroken):
            ours.save([target])
    assert delay.times > 900
