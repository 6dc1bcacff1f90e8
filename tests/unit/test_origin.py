"""Pages that go from frame to frame, between the RAM of two machines."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovr._fastcopy import OWNED, PIECE, RUN
from ovr.attempt.copier import Copier
from ovr.attempt.journal import Journal
from ovr.attempt.origin import EVERYWHERE, Lane, Origin
from ovr.attempt.targets import Target
from ovr.errors import AttemptFailed, GuestFault, RamNotShared, TaskDied, VerifyMismatch
from ovr.memory.addresses import PAGE_SIZE, Gpa
from ovr.memory.extents import cut_out, split
from ovr.memory.paging import AddressSpace
from ovr.memory.ranges import RANGE
from tests.unit.machine import Machine

THERE = 0x7000_0000
HERE = 0x5555_0000_0000
FIRST_FRAME = 1 << 20
PAGES = 64


def page(number):
    return number * PAGE_SIZE


@pytest.fixture
def machines(tmp_path):
    """The machine that pages come from, and the one that gets them, with two slots each."""
    both = []
    for name in ("source", "destination"):
        (tmp_path / name).mkdir()
        both.append(Machine.build(tmp_path / name, sizes=(1 << 20, 1 << 20)))
    yield both
    for machine in both:
        machine.ram.close()


def frame(number):
    # In both slots, between which there is a gap; not the first pages, which have page tables.
    return page(number + 128) if number < 64 else (3 << 20) + page(number - 64)


def fill(machine, gva, frames):
    """Map pages at `gva` to these frames, with random content; returns it."""
    content = []
    for number, at in enumerate(frames):
        if at is None:
            content.append(None)
            continue
        data = os.urandom(PAGE_SIZE)
        machine.ram.write(Gpa(frame(at)), data)
        machine.map(gva + page(number), frame(at))
        content.append(data)
    return content


def space(machine):
    return AddressSpace(machine.ram, machine.root, machine.levels)


class Owned(AddressSpace):
    """Of a running process: pages at odd frames are not its own."""

    def walk(self, ranges, frames=None, *, soft_dirty=False):
        runs = super().walk(ranges, None, soft_dirty=soft_dirty)
        if frames is not None and len(runs):
            runs = np.concatenate([*split(runs, PAGE_SIZE)])
            runs["flags"] |= np.where(runs["gpa"] // PAGE_SIZE % 2 == 0, OWNED, 0).astype("<u4")
        return runs


def origin_of(machine, places=None, **more):
    fields = {"check": lambda: None, "ask": lambda pieces: None, **more}
    kind = Owned if "frames" in more else AddressSpace
    there = kind(machine.ram, machine.root, machine.levels)
    places = np.array([(THERE, page(PAGES), 0)], PIECE) if places is None else places
    return Origin("pid 7", there, places, **fields)


def copied_by(origin, machine, pieces):
    """Copy pieces by one lane in one go; returns the bytes done, and the lane."""
    lane = Lane.make(origin, pieces, aside=False)
    return lane.copy(machine.ram, space(machine).walk(pieces)), lane


def read(machine, gva, size=PAGE_SIZE):
    return space(machine).read(gva, size)


def test_pages_go_to_other_addresses_and_frames(machines):
    source, destination = machines
    content = fill(source, THERE, [3, 90, 4, 65, 66, 5])
    fill(destination, HERE, [80, 10, 81, 11, 12, 13])
    pieces = np.array([(HERE, page(6), 0)], PIECE)
    done, lane = copied_by(origin_of(source), destination, pieces)
    assert done == page(6)
    assert read(destination, HERE, page(6)) == b"".join(content)
    assert lane.compare(destination.ram, space(destination).walk(pieces)) == (page(6), None)


def test_positions_are_found_by_their_places(machines):
    """A pagemap's pages lie one after the other in the image, but not in memory."""
    source, destination = machines
    content = fill(source, THERE, [1, 2, None, None, 3, None, 4])
    fill(destination, HERE, [20, 21, None, 22, None, 23])
    places = np.array([(THERE, page(2), 0), (THERE + page(4), page(1), page(2)),
                       (THERE + page(6), page(1), page(3))], PIECE)  # fmt: skip
    pieces = np.array([(HERE, page(2), 0), (HERE + page(3), page(1), page(2)),
                       (HERE + page(5), page(1), page(3))], PIECE)  # fmt: skip
    done, _ = copied_by(origin_of(source, places), destination, pieces)
    assert done == page(4)
    assert read(destination, HERE, page(2)) == content[0] + content[1]
    assert read(destination, HERE + page(3)) == content[4]
    assert read(destination, HERE + page(5)) == content[6]


def test_bytes_that_are_spared_stay(machines):
    source, destination = machines
    content = b"".join(fill(source, THERE, [1, 2, 3]))
    before = b"".join(fill(destination, HERE, [20, 30, 21]))
    start, end = HERE + page(1) + 100, HERE + page(1) + 132
    runs = space(destination).walk(np.array([(HERE, page(3), 0)], PIECE))
    cut = cut_out(runs, np.array([(start, end)], RANGE))
    lane = Lane(origin_of(source), np.array([(HERE, page(3), 0)], PIECE))
    assert lane.copy(destination.ram, cut) == page(3) - 32
    expected = bytearray(content)
    expected[page(1) + 100 : page(1) + 132] = before[page(1) + 100 : page(1) + 132]
    assert read(destination, HERE, page(3)) == bytes(expected)
    assert lane.compare(destination.ram, cut) == (page(3) - 32, None)


def test_a_stopped_process_is_copied_up_to_the_first_page_that_is_not_there(machines):
    source, destination = machines
    content = fill(source, THERE, [1, 2, None, 3])
    before = fill(destination, HERE, [20, 21, 22, 23])
    pieces = np.array([(HERE, page(4), 0)], PIECE)
    origin = origin_of(source)
    lane = Lane.make(origin, pieces, aside=False)
    assert lane.copy(destination.ram, space(destination).walk(pieces)) == page(2)
    assert read(destination, HERE, page(2)) == content[0] + content[1]
    assert read(destination, HERE + page(2), page(2)) == before[2] + before[3]
    assert lane.compare(destination.ram, space(destination).walk(pieces)) == (page(2), None)


def test_pages_that_are_not_there_are_asked_for(machines):
    source, destination = machines
    fill(source, THERE, [1, 2, None, 3])
    fill(destination, HERE, [20, 21, 22, 23])
    asked = []

    def ask(pieces):
        asked.extend(pieces[["gva", "size"]].tolist())
        fill(source, THERE + page(2), [40])

    pieces = np.array([(HERE, page(4), 0)], PIECE)
    origin = origin_of(source, ask=ask)
    lane = Lane.make(origin, pieces, aside=True)
    assert asked == [(THERE + page(2), page(1))]
    assert lane.copy(destination.ram, space(destination).walk(pieces)) == page(4)


def test_pages_that_stay_away_are_an_error(machines):
    source, _ = machines
    fill(source, THERE, [1, None])
    with pytest.raises(AttemptFailed):
        Lane.make(origin_of(source), np.array([(HERE, page(2), 0)], PIECE), aside=True)


def test_a_running_process_is_copied_without_what_is_not_its_own(machines):
    """Which pages were copied is told by their addresses and frames in the source."""
    source, destination = machines
    content = fill(source, THERE, [2, 3, None, 4, 6])
    before = fill(destination, HERE, [20, 21, 22, 23, 24])
    pieces = np.array([(HERE, page(5), THERE)], PIECE)
    origin = origin_of(source, EVERYWHERE, frames=object())
    done, lane = copied_by(origin, destination, pieces)
    assert done == page(5)
    expected = [content[0], before[1], before[2], content[3], content[4]]
    assert read(destination, HERE, page(5)) == b"".join(expected)
    assert [(int(run["gva"]), int(run["gpa"])) for run in lane.copied] == [
        (THERE, frame(2)), (THERE + page(3), frame(4)), (THERE + page(4), frame(6)),
    ]  # fmt: skip


def test_a_process_that_has_died_is_not_copied(machines):
    source, destination = machines
    fill(source, THERE, [1])
    fill(destination, HERE, [20])

    def died():
        raise TaskDied("pid 7 has died in the guest", "")

    with pytest.raises(TaskDied):
        copied_by(origin_of(source, check=died), destination, np.array([(HERE, 4096, 0)], PIECE))


def test_a_difference_is_named_by_its_address_here(machines):
    source, destination = machines
    fill(source, THERE, [1, 2, 3])
    fill(destination, HERE, [20, 21, 22])
    pieces = np.array([(HERE, page(3), 0)], PIECE)
    _, lane = copied_by(origin_of(source), destination, pieces)
    source.ram.write(Gpa(frame(2) + 77), b"another")
    assert lane.compare(destination.ram, space(destination).walk(pieces))[1] == HERE + page(1)


def crossing(*rows):
    return np.array([(HERE, gpa, size, there, 0, 12) for gpa, size, there in rows], RUN)


@pytest.mark.parametrize("there", [(1 << 20) - PAGE_SIZE, 4 << 20, (1 << 63) - PAGE_SIZE, -4096])
def test_frames_outside_of_the_other_ram_are_refused(machines, there):
    source, destination = machines
    rows = crossing((FIRST_FRAME // 2, PAGE_SIZE, 0), (FIRST_FRAME // 2, 2 * PAGE_SIZE, there))
    before = destination.ram.read(Gpa(FIRST_FRAME // 2), PAGE_SIZE)
    source.ram.write(Gpa(0), os.urandom(PAGE_SIZE))
    for work in (destination.ram.copy_across, destination.ram.first_difference_across):
        with pytest.raises(GuestFault):
            work(rows, source.ram)
    assert destination.ram.read(Gpa(FIRST_FRAME // 2), PAGE_SIZE) == before


@pytest.mark.parametrize("which", [0, 1])
def test_a_ram_file_that_is_cut_off_is_named(machines, which):
    source, destination = machines
    os.truncate(machines[which].ram.slots[0].file.name, 8 * PAGE_SIZE)
    rows = crossing((page(100), PAGE_SIZE, page(100)))
    for work in (destination.ram.copy_across, destination.ram.first_difference_across):
        with pytest.raises(RamNotShared):
            work(rows, source.ram)
        work(crossing((page(1), PAGE_SIZE, page(1))), source.ram)


frames = st.lists(st.one_of(st.none(), st.integers(0, 127)), min_size=PAGES, max_size=PAGES)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(there=frames, here=frames)
def test_any_frames(tmp_path_factory, there, here):
    """Pages of a running process: those that both have, and that are its own."""
    directory = tmp_path_factory.mktemp("ram")
    both = []
    for name in ("source", "destination"):
        (directory / name).mkdir()
        both.append(Machine.build(directory / name, sizes=(1 << 20, 1 << 20)))
    source, destination = both
    fill(source, THERE, there)
    fill(destination, HERE, here)
    pieces = np.array([(HERE, page(PAGES), THERE)], PIECE)
    origin = origin_of(source, EVERYWHERE, frames=object())
    done, lane = copied_by(origin, destination, pieces)
    own = [at is not None and frame(at) // PAGE_SIZE % 2 == 0 for at in there]
    assert done == sum(at is not None for at in here) * PAGE_SIZE
    last = {at: n for n, at in enumerate(here) if at is not None and own[n]}
    for n, at in enumerate(here):
        if at is not None and own[n] and last[at] == n:
            assert read(destination, HERE + page(n)) == read(source, THERE + page(n))
    assert sum(lane.copied["size"]) == PAGE_SIZE * sum(
        mine and at is not None for mine, at in zip(own, here, strict=True)
    )
    for machine in both:
        machine.ram.close()


class Holds:
    """A holder of a VM that does not run; notes the order of holds."""

    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    @contextmanager
    def held(self):
        self.seen.append(f"{self.name} held")
        yield
        self.seen.append(f"{self.name} runs")


def test_both_vms_are_held_while_pages_are_copied_and_compared(machines):
    source, destination = machines
    content = fill(source, THERE, [1, 70, 3])
    fill(destination, HERE, [20, 21, 22])
    seen = []
    here = SimpleNamespace(ram=destination.ram, walk=space(destination).walk)
    target = Target(
        "pid 7", Owned(destination.ram, destination.root, 4), None,
        np.array([(HERE, page(3), 0)], PIECE), origin_of(source), ask=lambda pieces: None,
        check=lambda: None,
    )  # fmt: skip
    owned = Owned(destination.ram, destination.root, 4)
    owned.walk = lambda ranges, frames=None, soft_dirty=False: _all_owned(here.walk(ranges))
    target = Target(**{**vars(target), "space": owned})
    with ThreadPoolExecutor(2) as pool:
        copier = Copier(
            Holds("destination", seen), pool, 2, Journal(), origin=Holds("source", seen)
        )
        copier.copy([], [target])
        assert seen == ["source held", "destination held", "destination runs", "source runs"]
        assert read(destination, HERE, page(3)) == b"".join(content)
        assert copier.verify([target], "full") == page(3)
        source.ram.write(Gpa(frame(3)), b"something else")
        with pytest.raises(VerifyMismatch):
            copier.verify([target], "full")


def _all_owned(runs):
    runs["flags"] |= OWNED
    return runs
