"""A short run of `tests.kill` for moves: what takes part is killed around the commit."""

from collections.abc import Iterator

import pytest

from ovr import lab
from ovr.lab import demo
from tests.kill.moving import MoveRange
from tests.kill.steps import Point
from tests.vm.conftest import EVERYTHING, PREFIX

pytestmark = pytest.mark.timeout(1800)

MEMORY = "512M"


@pytest.fixture(scope="module")
def vms() -> Iterator[tuple[lab.LabVm, lab.LabVm]]:
    with (
        demo.lab_vm(f"{PREFIX}from", memory=MEMORY) as source,
        demo.lab_vm(f"{PREFIX}to", memory=MEMORY) as destination,
    ):
        yield source, destination


@pytest.fixture(scope="module")
def place(vms, tmp_path_factory) -> MoveRange:
    source, destination = vms
    return MoveRange([lambda: source, lambda: destination], tmp_path_factory.mktemp("scratch"))


# Each side, and the host, at the message that decides.
POINTS = [
    ("all", "before a sending go"),
    ("agent-a", "before a sending go"),
    ("agent-b", "before b sending go"),
]
if EVERYTHING:
    POINTS += [
        ("all", "end of skeleton"),
        ("all", "end of ahead"),
        ("ovr", "before b sending go"),
    ]


# `shoot` checks that exactly one tree is left, and decides a move that is in doubt.
@pytest.mark.parametrize(("victim", "name"), POINTS)
def test_killed_in_a_move(place, victim, name):
    names = [event.name for event in place.events]
    became = place.shoot(victim, Point(place.events[names.index(name)].step))
    assert became.startswith(("runs on in A", "in doubt, ", "runs in B"))
