"""The destination's pool: it is found once and for all, and ends with the move."""

from types import SimpleNamespace

import pytest

from ovr.attempt import alive
from ovr.attempt.alive import alive_with_pool
from ovr.errors import AgentUntrusted, AttemptFailed, TaskDied
from ovr.guest.client.results import PoolInfo
from ovr.kernel.linux.mm import VM_SHARED
from ovr.move.pool import make_pool
from ovr.plan.pool.seats import Seat, Seats
from ovr.plan.pool.units import UNIT

BASE = 0x4000_0000_0000
SEATS = Seats({1: [Seat(0, 2 * UNIT, 0)]}, 2 * UNIT, 0)


class Agent:
    """Makes pools of a size."""

    def __init__(self, made):
        self.made, self.asked = made, []
        self.agent = self

    def warm(self, size, place=0, *, keep=True):
        self.asked.append((size, keep))
        return PoolInfo(self.made, 0, 7, BASE, "")


def test_a_pool_ends_with_the_move():
    agent = Agent(2 * UNIT)
    assert make_pool(agent, SEATS).size == 2 * UNIT
    assert agent.asked == [(2 * UNIT, False)]


def test_no_area_uses_a_pool():
    agent = Agent(0)
    assert make_pool(agent, Seats({}, 0, 0)) is None
    assert not agent.asked


def test_a_pool_that_is_too_small():
    with pytest.raises(AttemptFailed):
        make_pool(Agent(UNIT), SEATS)


@pytest.fixture
def kernel(monkeypatch):
    """A guest with one process, which has one area."""
    vma = SimpleNamespace(vm_end=BASE + 2 * UNIT, vm_flags=0, vm_file=None)
    task = SimpleNamespace(mm=object(), pid=7)
    found = SimpleNamespace(task=task, vma=vma, space=SimpleNamespace(root=1 << 20))
    monkeypatch.setattr(alive, "find_task", lambda kernel, pid: found.task)
    monkeypatch.setattr(alive, "find_vma", lambda mm, address: found.vma)
    monkeypatch.setattr(alive, "mm_space", lambda kernel, mm: found.space)
    return found


def pool_at(address=BASE, size=2 * UNIT):
    return PoolInfo(size, 0, 7, address, "")


def test_the_process_with_the_pool(kernel):
    owner = alive_with_pool(None, pool_at())
    owner()
    assert owner.space is kernel.space
    kernel.task = SimpleNamespace(mm=object(), pid=7)
    with pytest.raises(TaskDied):
        owner()


@pytest.mark.parametrize(
    ("address", "size", "vma"),
    [
        (BASE + 1, UNIT, {}),
        (BASE, UNIT + 1, {}),
        (BASE + UNIT, 2 * UNIT, {}),
        (BASE, 2 * UNIT, {"vm_flags": VM_SHARED}),
        (BASE, 2 * UNIT, {"vm_file": object()}),
    ],
)
def test_a_pool_that_cannot_be(kernel, address, size, vma):
    vars(kernel.vma).update(vma)
    with pytest.raises(AgentUntrusted) as caught:
        alive_with_pool(None, pool_at(address, size))
    assert caught.value.code == "pool"


def test_no_process_has_the_pool(kernel):
    kernel.task = None
    with pytest.raises(TaskDied):
        alive_with_pool(None, pool_at())
