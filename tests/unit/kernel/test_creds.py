"""Which tasks are root of the whole guest."""

import pytest

from ovr.kernel import Kernel, find_task, why_not_root

from ..machine import Machine
from .toy import ALL, ToyKernel

SYS_ADMIN = 1 << 21


@pytest.fixture
def toy(tmp_path):
    return ToyKernel(Machine.build(tmp_path))


@pytest.fixture
def kernel(toy):
    return Kernel.find(toy.machine.ram)


def reason(toy, kernel, cred, **options):
    task = toy.fork(700, "any", **options)
    toy.poke(task + 192, "Q", cred)
    return why_not_root(kernel, find_task(kernel, 700))


def test_root(toy, kernel):
    assert reason(toy, kernel, toy.cred()) == ""


@pytest.mark.parametrize("which", range(4))
def test_each_user_id_counts(toy, kernel, which):
    ids = [0] * 4
    ids[which] = 1000
    assert reason(toy, kernel, toy.cred(tuple(ids))) == "it runs as user 1000"


def test_root_of_a_user_namespace(toy, kernel):
    other = toy.cred(user_ns=toy.allocate(8))
    assert reason(toy, kernel, other) == "it is in a user namespace of its own"


def test_root_with_fewer_capabilities_than_init(toy, kernel):
    text = "it lacks capabilities 0x200000, which the guest's init has"
    assert reason(toy, kernel, toy.cred(effective=ALL & ~SYS_ADMIN)) == text


def test_a_guest_whose_init_has_not_all_of_them(toy, kernel):
    """Capabilities that the whole guest lacks are not required of the agent."""
    init = find_task(kernel, 1)
    toy.poke(init.address_ + 192, "Q", toy.cred(effective=ALL & ~1))
    assert reason(toy, kernel, toy.cred(effective=ALL & ~1)) == ""


def test_root_in_a_pid_namespace(toy, kernel):
    numbers = ((1, toy.namespace(1)),)
    text = "it is in a pid namespace of its own"
    assert reason(toy, kernel, toy.cred(), numbers=numbers) == text
