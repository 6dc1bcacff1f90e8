"""A pool that has pages of a tree before there are images: each page is used where it lies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr.images.vma import split_vma
from ovr.memory.ranges import RANGE, join
from ovr.plan.pool.layout import POOL_ADDRESS, Pool, pool_areas
from ovr.plan.pool.seats import RunningAreas, assign_seats, family_order
from ovr.plan.pool.table import Cold, Warm, plan_warm
from ovr.plan.pool.units import TABLE_SPAN, UNIT
from tests.unit.test_plan_pool import (
    BASE,
    MIB,
    SERVE,
    Cow,
    area,
    check,
    cut,
    families,
    parsed,
    placed,
    ranges,
    task_of,
    unrelated,
)


def seats_for(plans):
    """The seats, as a running tree gets them: by areas alone."""
    return assign_seats(
        [
            RunningAreas(
                plan.task.pid, plan.task.ppid,
                [(vma.start, vma.end) for vma in plan.areas if vma.prot & 2],
            )
            for plan in plans
        ]
    )  # fmt: skip


def planned(plans, seats, cow=None):
    """The inside areas, cut where seats end, and the table."""
    pool = Pool(max(seats.size, UNIT), "4.1.1", POOL_ADDRESS + seats.place, seats)
    cow = cow or unrelated(plans)
    pieces = {plan.task.pid: cut(plan.areas, plan.pieces_of_criu) for plan in plans}
    for pid, each in pool_areas(plans, cow, pieces, seats).items():
        edges = sorted({edge for one in each for edge in (one.start, one.end)})
        pieces[pid] = [
            part
            for vma in pieces[pid]
            for part in split_vma(vma, [edge for edge in edges if vma.start < edge < vma.end])
        ]
    return pieces, plan_warm(plans, cow, pieces, pool)


def check_seats(plans, pieces, warm, seats):
    """Each unit that is used is that of the same address of the same task."""
    check(plans, pieces, warm)
    _, tasks, dropped = parsed(warm.table)
    for task in tasks:
        for address, length, start, how in placed(task, pieces[task.pid]) if task.rows else ():
            if how != SERVE:
                continue
            assert any(
                seat.low <= address
                and address + length <= seat.high
                and start == seat.at + address - seat.low
                for seat in seats.of[task.pid]
            )
    for pid, kept in warm.kept.items():
        # Neighbours may be in the parts of two seats.
        for start in _units(kept).tolist():
            end = start + UNIT
            [seat] = [one for one in seats.of[pid] if one.low <= start and end <= one.high]
            part = ranges((start - seat.low + seat.at, end - seat.low + seat.at))
            assert not len(np.intersect1d(_units(part), _units(dropped)))


def _units(found):
    return np.array([at for low, high in found.tolist() for at in range(low, high, UNIT)])


def one_area(start, end):
    return task_of(1, [area(start, end)], ranges((start, end)))


def test_an_area_that_has_not_changed():
    plan = one_area(BASE + 5 * 4096, BASE + 9 * MIB)
    seats = seats_for([plan])
    assert seats.size == 10 * MIB
    pieces, warm = planned([plan], seats)
    check_seats([plan], pieces, warm, seats)
    assert warm.bytes == 6 * MIB
    assert warm.kept[1].tolist() == [(BASE + 2 * MIB, BASE + 8 * MIB)]


def test_two_tasks_with_one_pid_have_one_set_of_seats():
    """No kernel has them, but one that lies may."""
    twins = [RunningAreas(1, 0, [(BASE, BASE + 4 * MIB)])] * 2
    twins += [RunningAreas(2, 1, [(BASE, BASE + 2 * MIB)])] * 2
    seats = assign_seats(twins)
    assert seats.size == 6 * MIB
    assert {pid: len(each) for pid, each in seats.of.items()} == {1: 1, 2: 1}


def test_the_largest_area_has_its_final_place_modulo_a_page_table():
    plan = one_area(BASE + 300 * MIB, BASE + 1900 * MIB)
    seats = seats_for([plan])
    assert (POOL_ADDRESS + seats.place - plan.areas[0].start) % TABLE_SPAN == 0
    pieces, warm = planned([plan], seats)
    check_seats([plan], pieces, warm, seats)


@pytest.mark.parametrize(
    ("start", "end", "used"),
    [
        (BASE, BASE + 40 * MIB, 16),  # it has grown
        (BASE - 20 * MIB, BASE + 16 * MIB, 16),  # downwards
        (BASE - 20 * MIB, BASE + 40 * MIB, 16),
        (BASE + 4 * MIB, BASE + 16 * MIB, 12),  # it has shrunk
        (BASE + 3 * MIB, BASE + 15 * MIB, 10),
    ],
)
def test_an_area_that_has_changed(start, end, used):
    seats = seats_for([one_area(BASE, BASE + 16 * MIB)])
    plan = one_area(start, end)
    pieces, warm = planned([plan], seats)
    check_seats([plan], pieces, warm, seats)
    assert warm.bytes == used * MIB


def test_an_area_that_has_moved_uses_nothing():
    seats = seats_for([one_area(BASE, BASE + 16 * MIB)])
    _, warm = planned([one_area(BASE + 64 * MIB, BASE + 80 * MIB)], seats)
    assert isinstance(warm, Cold)


def test_areas_that_have_become_one_use_both_seats():
    two = [area(BASE, BASE + 8 * MIB), area(BASE + 10 * MIB, BASE + 20 * MIB)]
    seats = seats_for([task_of(1, two, ranges((BASE, BASE + 8 * MIB)))])
    plan = one_area(BASE, BASE + 20 * MIB)
    pieces, warm = planned([plan], seats)
    check_seats([plan], pieces, warm, seats)
    assert warm.bytes == 18 * MIB


def test_an_area_that_was_split_within_a_unit_uses_its_seat_twice():
    middle = BASE + 5 * MIB
    seats = seats_for([one_area(BASE, BASE + 12 * MIB)])
    parts = [area(BASE, middle), area(middle, BASE + 12 * MIB, prot=7)]
    plan = task_of(1, parts, ranges((BASE, middle), (middle, BASE + 12 * MIB)))
    pieces, warm = planned([plan], seats)
    check_seats([plan], pieces, warm, seats)
    assert warm.bytes == 10 * MIB


def test_an_area_is_not_cut_into_one_that_its_parent_has():
    """CRIU would let the child inherit it."""
    parent = one_area(BASE, BASE + 16 * MIB)
    child = task_of(2, [area(BASE, BASE + 16 * MIB, prot=7)], ranges(), ppid=1)
    seats = seats_for([parent, child])
    grown = task_of(2, [area(BASE, BASE + 32 * MIB)], ranges((BASE, BASE + 32 * MIB)), ppid=1)
    pieces, warm = planned([parent, grown], seats)
    check_seats([parent, grown], pieces, warm, seats)
    assert not len(warm.kept[2])
    assert all((one.start, one.end) != (BASE, BASE + 16 * MIB) for one in pieces[2])


def test_a_task_without_a_seat_uses_nothing():
    plan = one_area(BASE, BASE + 8 * MIB)
    seats = seats_for([plan])
    other = task_of(2, [area(BASE + 64 * MIB, BASE + 72 * MIB)],
                    ranges((BASE + 64 * MIB, BASE + 72 * MIB)), ppid=1)  # fmt: skip
    pieces, warm = planned([plan, other], seats)
    check_seats([plan, other], pieces, warm, seats)
    assert warm.bytes == 8 * MIB


def test_pages_that_are_shared_by_fork_are_left_alone():
    whole = ranges((BASE, BASE + 8 * MIB))
    parent, child = one_area(BASE, BASE + 8 * MIB), task_of(2, [area(*whole[0])], whole, ppid=1)
    seats = seats_for([parent])
    _, warm = planned([parent, child], seats, Cow({1: {}, 2: {1: whole}}))
    assert isinstance(warm, Cold)


def test_descendants_follow_their_ancestors():
    assert family_order([(1, 0), (5, 1), (2, 1), (7, 2), (6, 5), (9, 7)]) == [1, 5, 6, 2, 7, 9]


@st.composite
def changed(draw):
    """A tree, and what it has become meanwhile."""
    before = draw(families())
    after = []
    gone = draw(st.sets(st.integers(2, 5), max_size=1))
    for plan in before:
        if plan.task.pid in gone:
            continue
        areas = []
        for vma in plan.areas:
            size = vma.end - vma.start
            low, high = sorted(draw(st.integers(-300, 300 + size // 4096)) * 4096 for _ in range(2))
            if draw(st.booleans()):
                low, high = 0, size
            if draw(st.integers(0, 4)) and low < high:
                areas.append(area(vma.start + low, vma.start + high, prot=vma.prot))
        areas = [
            one for n, one in enumerate(areas) if all(other.end < one.start for other in areas[:n])
        ]
        areas = areas or [area(0x400000, 0x403000, prot=1)]
        held = [(one.start, one.end) for one in areas if one.prot & 2 and draw(st.integers(0, 5))]
        ppid = plan.task.ppid if plan.task.ppid not in gone else 1
        after.append(task_of(plan.task.pid, areas, join(np.array(held, RANGE)), ppid=ppid))
    return before, after


@settings(deadline=None, max_examples=300)
@given(changed())
def test_any_tree_that_changes(trees):
    before, after = trees
    seats = seats_for(before)
    pieces, warm = planned(after, seats)
    if isinstance(warm, Warm):
        check_seats(after, pieces, warm, seats)
    else:
        assert warm.why
