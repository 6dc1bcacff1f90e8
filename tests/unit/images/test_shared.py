"""Shared memory of real dumps: what it is, and who has it."""

from ovr.images import ImageSet
from ovr.images.shared import shared_memory


def test_an_anonymous_mapping_of_one_task(dumps):
    with ImageSet.open(dumps / "one") as images:
        [shared] = shared_memory(images)
        [place] = shared.places
        assert (place.pid, place.address, place.fd) == (images.tasks[0].pid, 0x100300000, None)
        assert not shared.sealed
        assert shared.memory is images.shared[shared.shmid]


def test_one_object_of_parent_and_child(dumps):
    with ImageSet.open(dumps / "tree") as images:
        [shared] = shared_memory(images)
        alive = [task.pid for task in images.tasks if task.alive]
    assert [place.pid for place in shared.places] == alive
    assert {place.address for place in shared.places} == {0x100300000}
