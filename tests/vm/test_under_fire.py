"""Short runs of `tests.soak`, `tests.kill` and `tests.stress`, one after the other in one VM."""

import os
import tempfile
from collections.abc import Iterator

import pytest

import ovr
from ovr import lab
from ovr.lab import demo
from tests import subject
from tests.kill.__main__ import Range
from tests.kill.attempt import ON_THE_HOST
from tests.kill.dumping import DumpRange
from tests.kill.steps import Point
from tests.soak.__main__ import GROWTH, soak
from tests.stress.__main__ import Outcome, Stress, run
from tests.stress.copier import counting
from tests.vm.conftest import EVERYTHING, PREFIX

SIZE = 16 << 20
MEMORY = "640M"
MORE = 4 if EVERYTHING else 1


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Iterator[tuple[lab.LabVm, subject.Images]]:
    """A VM with two NUMA nodes, and a dump of a tree that ran in it."""
    path = tmp_path_factory.mktemp("images")
    with demo.lab_vm(f"{PREFIX}fire", memory=MEMORY, numa=2, share=path) as vm:
        subject.install(vm)
        pid = subject.start(vm, SIZE, "mergeable")
        subject.dump(vm, pid)
        subject.end(vm)
        yield vm, subject.Images(path, pid, SIZE)


@pytest.fixture
def images(target) -> subject.Images:
    return target[1]


@pytest.fixture
def vm(target) -> Iterator[lab.LabVm]:
    running, _ = target
    yield running
    if running.alive:
        subject.end(running)


def test_damage_is_seen(vm, images):
    """One byte of all, changed behind the tree's back."""
    with ovr.attach(f"lab:{vm.name}") as attached:
        attached.restore(images.path)
    first = "$(awk '/ rw-p / && !/\\[/ { split($1, ends, \"-\"); print ends[1] }' maps | tail -n 1)"
    poke = f"dd of=mem bs=1 seek=$((0x{first} + 5)) conv=notrunc status=none"
    subject.must(vm, f"cd /proc/{images.pid} && printf X | {poke}")
    assert subject.ask(vm).wrong == 1


def test_many_in_a_row(vm, images, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # The process is young: what its allocator keeps is no leak yet.
    growth = {**GROWTH, "host: KiB": 64 << 10}
    if os.environ.get("OVR_SANITIZE"):
        growth["guest: KiB of the agent"] = 256 << 10  # AddressSanitizer keeps what was freed
    assert soak(vm, images, 4 * MORE, warm=2, growth=growth) == []


@pytest.fixture(scope="module")
def place(target, tmp_path_factory) -> Range:
    vm, images = target
    return Range(lambda: vm, images, tmp_path_factory.mktemp("scratch"))


# Where each is killed: the first event of that name.
POINTS = {
    "ovr": "after copying",  # in a hold
    "agent": "end of populate",
    "criu": "end of memory",
}
if EVERYTHING:  # by default in a dump
    POINTS |= dict.fromkeys(("tracer", "all"), "after copying")


@pytest.mark.parametrize("victim", POINTS)
def test_killed(vm, place, victim):
    assert place.vm is vm
    [event, *_] = [event for event in place.events if event.name == POINTS[victim]]
    assert place.shoot(victim, Point(event.step)) == "gone"


ROUNDS = {"stopped": 0, "pre-copied": 2} if EVERYTHING else {"pre-copied": 2}


@pytest.fixture(scope="module", params=ROUNDS.values(), ids=ROUNDS)
def dumping(request, target, tmp_path_factory) -> DumpRange:
    vm, images = target
    scratch = tmp_path_factory.mktemp("scratch")
    return DumpRange(lambda: vm, images.path, scratch, rounds=request.param)


# The memory is being read, while the tree runs or is held by CRIU's hook: for victims on the host
# in a hold.
AHEAD: tuple[str, ...] = ("all",)
STOPPED: tuple[str, ...] = ("tracer", "agent", "hook", "criu")
if EVERYTHING:
    AHEAD = (*ON_THE_HOST, "agent")
    STOPPED = (*ON_THE_HOST, "agent", "hook", "criu")


@pytest.mark.parametrize(
    ("victim", "before"),
    [
        *((victim, "end of ahead") for victim in AHEAD),
        *((victim, "end of memory") for victim in STOPPED),
    ],
)
def test_killed_in_a_dump(vm, dumping, victim, before):
    assert dumping.vm is vm
    names = [event.name for event in dumping.events]
    number = names.index(before)
    while dumping.events[number].held != (victim in ON_THE_HOST):
        number -= 1
    # Without its tracer a hold is broken off, and read again.
    became = "ended, and restored" if victim == "tracer" else "runs on"
    assert dumping.shoot(victim, Point(dumping.events[number].step)) == became


def test_under_stress(vm, images):
    outcome = Outcome()
    stress = Stress(vm, images, canary_mib=16)
    run(stress, 2 * MORE, counting(outcome.races, pause=0.1), outcome)
    stress.noise.stop()
    assert (outcome.passed, outcome.failed) == (2 * MORE, [])
    assert outcome.counters["pages migrated"] > 0


def test_qemu_is_killed(vm, place):
    """The last test: the VM is dead afterwards."""
    [event, *_] = [event for event in place.events if event.name == "before copying"]
    said = place.hit("qemu", Point(event.step))
    assert said.startswith("failed VmUnreachable"), said
    assert not vm.alive
