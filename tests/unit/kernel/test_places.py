"""Known places save the search, and never lead to a kernel that no longer runs."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovr.kernel import Kernel
from ovr.kernel import kernel as module
from ovr.kernel.cache import cache_directory
from ovr.kernel.find import places
from ovr.kernel.find.places import Place, note, recall
from ovr.memory.addresses import Gpa

from ..machine import Machine
from .test_kernel import second_machine
from .toy import GLOBALS, ToyKernel

NOW = 1_900_000_000.0


@pytest.fixture
def clock(monkeypatch):
    """The host's clock: ``clock.now`` is what it says."""

    class Clock:
        now = NOW

        def time(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(places, "time", clock)
    return clock


@pytest.fixture
def searches(monkeypatch):
    """Every search through all RAM adds an element."""
    made = []

    def candidates(ram, search=module.candidates):
        made.append(ram)
        return search(ram)

    monkeypatch.setattr(module, "candidates", candidates)
    return made


@pytest.fixture
def toy(tmp_path):
    return ToyKernel(Machine.build(tmp_path))


def tick(toy, clock, seconds):
    """Time goes by, for the host and for this kernel."""
    clock.now += seconds
    toy.clock += int(seconds)
    toy.poke(toy.base + GLOBALS + 256 + 8 + 16, "Q", toy.clock)


def test_a_kernel_that_runs_on_is_not_searched_again(toy, clock, searches):
    for elapsed in (0, 1, 3600, 86400):
        tick(toy, clock, elapsed)
        assert Kernel.find(toy.machine.ram).release == "6.12.0-toy"
    assert len(searches) == 1


@pytest.mark.parametrize("jump", [2, -3, 1e6])
def test_a_clock_that_did_not_go_on_means_a_search(toy, clock, searches, jump):
    Kernel.find(toy.machine.ram)
    clock.now += jump
    Kernel.find(toy.machine.ram)
    assert len(searches) == 2
    Kernel.find(toy.machine.ram)
    assert len(searches) == 2


def test_a_reboot_leaves_a_whole_kernel_at_the_known_place(tmp_path, clock, searches):
    machine = Machine.build(tmp_path)
    dead = ToyKernel(machine, release="dead")
    assert Kernel.find(machine.ram).release == "dead"
    clock.now += 5
    ToyKernel(
        second_machine(machine), image=0x60_0000, note=0x10_0000, heap=0x30_0000,
        base=0xFFFF_FFFF_9A00_0000, clock=dead.clock + 5, release="next",
    )  # fmt: skip
    assert Kernel.find(machine.ram).release == "next"
    assert len(searches) == 2


def test_another_guest_at_the_same_host(toy, clock, searches, tmp_path):
    Kernel.find(toy.machine.ram)
    (tmp_path / "other").mkdir()
    other = ToyKernel(Machine.build(tmp_path / "other"), note=0x10_0000)
    assert Kernel.find(other.machine.ram).info.gpa == 0x10_0000
    assert [place.gpa for place in recall()] == [0x10_0000, toy.note]
    for one in (toy, other):
        Kernel.find(one.machine.ram)
    assert len(searches) == 2


def test_only_the_latest_places_are_kept():
    for number in range(40):
        note(Place(Gpa(number << 12), 0.25))
    note(Place(Gpa(30 << 12), -1.5))
    assert len(recall()) == places.KEPT
    assert recall()[:2] == [Place(Gpa(30 << 12), -1.5), Place(Gpa(39 << 12), 0.25)]
    assert len({place.gpa for place in recall()}) == places.KEPT


LINES = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"1001 0", b"-1000 0", b"1000 nan", b"1000 inf", b"1000", b"zz 1", b"1000 0 0",
                     b"10000000000000000 0"]),
)  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(LINES, max_size=20).map(b"\n".join))
def test_a_damaged_file_means_a_search(cache, content):
    cache_directory().mkdir(mode=0o700, parents=True, exist_ok=True)
    (cache_directory() / places.FILE).write_bytes(content)
    for place in recall():
        assert place.gpa % 4096 == 0
    note(Place(Gpa(0x5000), 1.0))
    assert recall()[0] == Place(Gpa(0x5000), 1.0)


def test_places_outside_of_ram(toy, clock):
    for gpa in (0x7F_F000, 0x80_0000, (1 << 52) - 4096):
        note(Place(Gpa(gpa), 0.0))
    assert Kernel.find(toy.machine.ram).info.gpa == toy.note


def test_a_kernel_without_a_clock_is_searched_each_time(tmp_path, searches):
    toy = ToyKernel(Machine.build(tmp_path), without=frozenset({"tk_core"}))
    for _ in range(2):
        assert Kernel.find(toy.machine.ram).release == "6.12.0-toy"
    assert len(searches) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_places_in_another_users_directory_are_not_used(cache):
    note(Place(Gpa(0x5000), 1.0))
    assert recall() == [Place(Gpa(0x5000), 1.0)]
    os.chown(cache_directory(), 12345, 12345)
    before = (cache_directory() / places.FILE).read_bytes()
    assert recall() == []
    note(Place(Gpa(0x6000), 1.0))
    assert (cache_directory() / places.FILE).read_bytes() == before


def test_no_home(toy, monkeypatch):
    def lost():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lost)
    assert recall() == []
    assert Kernel.find(toy.machine.ram).release == "6.12.0-toy"
