"""A short run of `tests.kill` for moves: what takes part is killed around the commit."""

from collections.abc import Iterator

import pytest

from ovr import lab
from ovr.lab import demo
from tests.kill.attempt import Point
from tests.kill.moving import MoveRange
from tests.vm.conftest import PREFIX

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


# The pool in B and the images on the host are those of a killed move; then there are two trees of
# which neither may run; then the one in B does.
@pytest.mark.parametrize(
    ("victim", "name", "became"),
    [
        ("all", "end of skeleton", "runs on in A"),
        ("all", "end of ahead", "runs on in A"),
        ("ovr", "before b sending go", "in doubt, taken back"),
        ("all", "before a sending go", "in doubt, finished"),
        ("agent-a", "before a sending go", "in doubt, finished"),
        ("agent-b", "before b sending go", "runs on in A"),
    ],
)
def test_killed_in_a_move(place, victim, name, became):
    names = [event.name for event in place.events]
    assert place.shoot(victim, Point(names.index(name), 0.0, name)) == became
