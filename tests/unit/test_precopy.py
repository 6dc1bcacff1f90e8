"""When rounds of copies end."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from ovr._fastcopy import OWNED, RUN, SOFT_DIRTY
from ovr.dump import precopy, running
from ovr.dump.precopy import AS_MANY_AS_HELP, PreCopy
from ovr.dump.running import RunningTask
from ovr.errors import AttemptFailed, GuestFault
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.paging import pieces
from ovr.memory.ranges import no_ranges
from ovr.move.story import _check_converged

MIB = 1 << 20
SIZE = 100 * MIB


class Tree:
    """A task that changes so many bytes between two looks; agent, store and clock in one."""

    def __init__(self, changes):
        self.changes = iter(changes)
        self.saved = []
        self.frozen = 0
        self.space = SimpleNamespace(root=1)
        self.pid = 7
        self.dirty = 0

    def track(self, *, stop=False):
        return 0.01

    def freeze(self):
        self.frozen += 1

    def walk_marked(self, holder):
        runs = np.zeros(2, RUN)
        runs["gva"], runs["gpa"] = (MIB, MIB + self.dirty), (MIB, MIB + self.dirty)
        runs["size"] = self.dirty, SIZE - self.dirty
        runs["flags"] = OWNED | SOFT_DIRTY, OWNED
        return runs[runs["size"] > 0]

    def begin_round(self):
        pass

    def save(self, task, number, pages, before):
        self.saved.append(int(pages["size"].sum()))
        self.dirty = next(self.changes)
        return pages

    def end_round(self):
        pass


def copied(monkeypatch, changes, rounds=AS_MANY_AS_HELP, budget=0.0):
    """Copy in rounds, each of which takes a second; return the bytes of each."""
    tree = Tree(changes)
    clock = iter(range(1000))
    monkeypatch.setattr(precopy, "running_tasks", lambda kernel, pid: [tree])
    monkeypatch.setattr(precopy.time, "perf_counter", lambda: float(next(clock)))
    attempt = SimpleNamespace(agent=tree, holder=None, vm=SimpleNamespace(kernel=None))
    ours = PreCopy(attempt, 7, tree)
    ours.run(rounds, budget)
    assert tree.frozen == len(ours.rounds) - 1
    return tree.saved, ours


def test_until_little_changes(monkeypatch):
    saved, ours = copied(monkeypatch, [40 * MIB, 15 * MIB, 6 * MIB])
    assert saved == [SIZE, 40 * MIB, 15 * MIB]
    assert ours.left == (6 * MIB, 8 * MIB)


def test_until_it_does_not_help(monkeypatch):
    saved, ours = copied(monkeypatch, [40 * MIB, 30 * MIB])
    assert saved == [SIZE, 40 * MIB]
    assert ours.left == (30 * MIB, 8 * MIB)


def test_until_the_rest_takes_no_longer_than_it_may(monkeypatch):
    saved, ours = copied(monkeypatch, [40 * MIB, 19 * MIB], budget=0.25)
    assert saved == [SIZE, 40 * MIB]
    assert ours.left == (19 * MIB, 25 * MIB)


@pytest.mark.parametrize("rounds", [1, 3])
def test_as_many_as_asked_for(monkeypatch, rounds):
    saved, ours = copied(monkeypatch, [40 * MIB] * 9, rounds)
    assert len(saved) == len(ours.rounds) == rounds
    assert ours.left == (0, 0)


@pytest.mark.parametrize(("left", "few"), [(9, 8), (100 * MIB, MIB)])
def test_a_strict_move_of_a_tree_that_writes_too_fast(left, few, caplog):
    pre_copy = SimpleNamespace(left=(left, few))
    with pytest.raises(AttemptFailed) as caught:
        _check_converged(pre_copy, strict=True)
    assert caught.value.code == "not-converging"
    _check_converged(pre_copy, strict=False)
    assert caplog.records


def test_a_move_of_one_that_does_not(caplog):
    for strict in (False, True):
        _check_converged(SimpleNamespace(left=(8, 8)), strict=strict)
    assert not caplog.records


def test_a_task_with_more_pages_than_the_guest_can_have(monkeypatch):
    """Its page tables lead to the same frames again and again."""
    monkeypatch.setattr(running, "_WALK_BYTES", 8 * PAGE_SIZE)
    monkeypatch.setattr(running, "_RUNS_OF_ANY", 4)
    walked = []

    class Space:
        ram = SimpleNamespace(size=16 * PAGE_SIZE)

        def walk(self, part, frames, *, soft_dirty):
            walked.append(int(part["size"].sum()))
            return np.zeros(walked[-1] // PAGE_SIZE, RUN)

    areas = pieces([(0, 1 << 30, 0)])
    task = RunningTask(7, 1, 7, Space(), (), areas, no_ranges(), None, lambda: None)
    with pytest.raises(GuestFault):
        task.walk(SimpleNamespace(held=nullcontext), areas)
    assert len(walked) == 5
    assert len(task.walk(SimpleNamespace(held=nullcontext), pieces([(0, 1 << 17, 0)]))) == 32
