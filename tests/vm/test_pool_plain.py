"""The pool under CRIU alone: each program is right in itself, and strict.

Only with OVR_POOL_PLAIN=1, for `test_pool.py` runs the same programs restored from outside.
"""

import os
import shutil
from collections.abc import Iterator

import pytest

from ovr import lab
from ovr.lab.share import SHARE
from tests.vm import pool
from tests.vm.conftest import PREFIX

pytestmark = pytest.mark.skipif(
    not os.environ.get("OVR_POOL_PLAIN"), reason="OVR_POOL_PLAIN=1: the pool under CRIU alone"
)
SUITES = os.environ.get("OVR_POOL_SUITES", "trixie bookworm forky").split()
SABOTAGES = 12  # about so many places in each program
CASES = [
    pytest.param(suite, program, id=f"{suite}-{program.name}")
    for suite in SUITES
    for program in pool.POOL
    if suite not in program.unsupported
]


@pytest.fixture(scope="session")
def share(tmp_path_factory):
    return tmp_path_factory.mktemp("pool")


class Pair:
    """Two VMs of a suite with one share: dumped in one, restored in the other."""

    def __init__(self, suite: str, share) -> None:
        self.suite, self.share = suite, share
        self._vms: dict[str, lab.LabVm] = {}

    def vm(self, which: str) -> lab.LabVm:
        if which not in self._vms or not self._vms[which].alive:
            name = f"{PREFIX}{self.suite}-{which}"
            self._vms[which] = lab.up(name, suite=self.suite, memory="1G", share=self.share)
        return self._vms[which]

    def running(self) -> list[lab.LabVm]:
        return [vm for vm in self._vms.values() if vm.alive]

    def close(self) -> None:
        for vm in self._vms.values():
            vm.down()


@pytest.fixture(scope="session")
def pairs(share) -> Iterator[dict[str, Pair]]:
    class Pairs(dict):
        def __missing__(self, suite: str) -> Pair:
            for old in self.values():
                old.close()
            self[suite] = Pair(suite, share)
            return self[suite]

    pairs = Pairs()
    yield pairs
    for pair in pairs.values():
        pair.close()


@pytest.fixture
def pair(suite, program, pairs, share) -> Iterator[Pair]:
    pair = pairs[suite]
    yield pair
    for vm in pair.running():
        pool.end(vm, program)
    shutil.rmtree(share / program.name, ignore_errors=True)


@pytest.mark.parametrize(("suite", "program"), CASES)
def test_comes_back(pair, program, share):
    source, target = pair.vm("a"), pair.vm("b")
    images = share / program.name
    images.mkdir()
    guest_images = f"{SHARE}/{program.name}"
    pool.install(source, program)
    pid = pool.start(source, program)
    before = pool.ask(source, program)
    assert before["ok"], before
    pool.dump(source, program, pid, guest_images)
    pool.install(target, program)
    pool.restore_plain(target, program, guest_images)
    for number in (2, 3):
        answer = pool.ask(target, program)
        assert answer["ok"], answer
        assert answer["round"] == number
        assert answer["checks"] >= before["checks"] * 0.9


@pytest.mark.parametrize(
    ("suite", "program"), [case for case in CASES if case.values[0] == SUITES[0]]
)
def test_notices_sabotage(pair, program):
    """A byte that is changed from outside is seen, wherever it is."""
    vm = pair.vm("a")
    pool.install(vm, program)
    pool.start(vm, program)
    places = pool.targets(vm, program)
    undone = [place for place in places if not place.once]
    for place in undone[:: max(1, len(undone) // SABOTAGES)]:
        pool.poke(vm, program, place)
        assert not pool.ask(vm, program)["ok"], place
        pool.poke(vm, program, place)
        answer = pool.ask(vm, program)
        assert answer["ok"], (place, answer)
    pool.end(vm, program)
    once = [number for number, place in enumerate(places) if place.once]
    assert undone or once
    for number in once:
        pool.start(vm, program)
        place = pool.targets(vm, program)[number]
        pool.poke(vm, program, place)
        assert not pool.ask(vm, program)["ok"], place
        pool.end(vm, program)
