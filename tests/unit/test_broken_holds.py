"""Work in holds that are broken off: what is done again, and what is given up."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from ovr._fastcopy import PIECE
from ovr.attempt.copier import Copier
from ovr.attempt.journal import Journal
from ovr.attempt.targets import Family, Target
from ovr.dump.running import RunningTask
from ovr.errors import HoldBroken, OvrError
from ovr.images.source import Source
from ovr.memory.extents import total
from ovr.memory.ram import GuestRam
from ovr.vm.hold import BothHeld, Holder, unbroken
from tests.unit.machine_process import RAM_BYTES, Monitor, RunningMachine
from tests.unit.test_copier import BEGIN, Space

BOUND = 0.05  # seconds
SIZE = RAM_BYTES - BEGIN


class Harm:
    """A check of a target that breaks the hold it is called in, as often as it is told to."""

    def __init__(self, holder: Holder, how: str) -> None:
        self._holder = holder
        self._how = how
        self.times = 0

    def __call__(self) -> None:
        if not self.times:
            return
        self.times -= 1
        if self._how == "tracer killed":
            os.kill(self._holder.tracer, signal.SIGKILL)
        else:
            time.sleep(4 * BOUND)


@pytest.fixture
def machine(tmp_path) -> Iterator[RunningMachine]:
    machine = RunningMachine(tmp_path, threads=3)
    yield machine
    machine.close()


@pytest.fixture
def content() -> bytes:
    return os.urandom(SIZE)


@contextmanager
def copier(machine, content, how):
    with (
        GuestRam([machine.slot], writable=True) as ram,
        Holder(Monitor(machine.pid), ram=ram, bound=BOUND) as holder,
        ThreadPoolExecutor(2) as pool,
    ):
        harm = Harm(holder, how)
        source = Source("pages-1.img", memoryview(content), os.memfd_create("source"), 0)
        os.write(source.fd, content)
        target = Target(
            "pid 1", Space(ram), None, np.array([(BEGIN, SIZE, 0)], PIECE), source,
            ask=lambda pieces: None, check=harm,
        )  # fmt: skip
        yield Copier(holder, pool, 2, Journal()), target, harm
        os.close(source.fd)


def ram_of(machine) -> bytes:
    with machine.path.open("rb") as file:
        file.seek(BEGIN)
        return file.read()


def test_a_write_is_repeated_if_it_ended_before_the_vm_ran(machine, content):
    with copier(machine, content, "too long") as (ours, target, harm):
        harm.times = 3
        ours.write([(target, target.pieces)])
        assert not harm.times
        assert sum(entry.bytes for entry in ours.journal.memory) == SIZE
    assert ram_of(machine) == content


def test_a_write_is_not_repeated_if_the_vm_may_have_run_in_it(machine, content):
    with copier(machine, content, "tracer killed") as (ours, target, harm):
        harm.times = 2
        with pytest.raises(HoldBroken) as caught:
            ours.write([(target, target.pieces)])
        assert not caught.value.after_writes
        assert harm.times == 1
        assert not ours.journal.memory


def test_a_write_is_given_up_when_all_holds_are_broken_off(machine, content):
    with copier(machine, content, "too long") as (ours, target, harm):
        harm.times = 1000
        with pytest.raises(HoldBroken) as caught:
            ours.write([(target, target.pieces)])
        assert caught.value.after_writes
        assert 900 < harm.times < 999


@pytest.mark.parametrize("how", ["too long", "tracer killed"])
def test_pages_are_compared_whatever_holds_are_broken_off(machine, content, how):
    with copier(machine, content, how) as (ours, target, harm):
        ours.write([(target, target.pieces)])
        harm.times = 3
        assert ours.verify([target], "full") == SIZE
        assert not harm.times


@pytest.mark.parametrize("how", ["too long", "tracer killed"])
def test_a_running_task_is_walked_whatever_holds_are_broken_off(machine, content, how):
    with copier(machine, content, how) as (ours, target, harm):
        task = RunningTask(1, 0, 1, SoftDirty(target.space.ram), (), target.pieces, (), None, harm)
        harm.times = 3
        assert total(task.walk(ours.holder, task.areas)) == SIZE
        assert not harm.times


class SoftDirty(Space):
    """The same, walked for soft-dirty bits."""

    def walk(self, pieces, frames=None, *, soft_dirty=False):
        return super().walk(pieces, frames)


class Elsewhere(Space):
    """Every page on another frame; the hold breaks when this has been found."""

    def __init__(self, ram, harm):
        super().__init__(ram)
        self.harm = harm

    def walk(self, pieces, frames=None):
        self.harm()
        runs = super().walk(pieces, frames)
        runs["gpa"] = 0
        return runs


def test_what_was_seen_in_a_broken_hold_is_forgotten(machine, content):
    """Otherwise pages that a family does not share would be written more than once."""
    with copier(machine, content, "too long") as (ours, one, harm):
        first = replace(one, check=lambda: None)
        descendant = Target(
            "pid 2", Elsewhere(first.space.ram, harm), None, first.pieces, first.source,
            ask=lambda pieces: None, check=lambda: None,
        )  # fmt: skip
        harm.times = 2
        left = ours.write_families([Family(first, [descendant], [])])
        assert not harm.times
    assert all(target is descendant for target, _ in left)
    assert sum(total(part) for _, part in left) == SIZE


class Broken:
    """Holds of which each ends as it is told."""

    def __init__(self, *ends: OvrError | None) -> None:
        self.ends = [*ends]

    @contextmanager
    def held(self) -> Iterator[None]:
        try:
            yield
        finally:
            if (end := self.ends.pop(0)) is not None:
                raise end


def broken(*, after_writes: bool) -> HoldBroken:
    error = HoldBroken("")
    error.after_writes = after_writes
    return error


@pytest.mark.parametrize("source", [None, True, False])
@pytest.mark.parametrize("destination", [None, True, False])
def test_a_write_with_two_vms_held_is_repeated_if_both_ended_in_order(source, destination):
    """The error of the hold that ends last does not hide that of the other."""
    ends = [None if end is None else broken(after_writes=end) for end in (source, destination)]
    times = []
    both = BothHeld(Broken(ends[0], None), Broken(ends[1], None))
    if False in (source, destination):
        with pytest.raises(HoldBroken) as caught:
            unbroken(both, lambda: times.append(1), writes=True)
        assert not caught.value.after_writes and len(times) == 1
    else:
        unbroken(both, lambda: times.append(1), writes=True)
        assert len(times) == (1 if source is None and destination is None else 2)
