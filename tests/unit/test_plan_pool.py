"""The table for the library in a CRIU with a pool, carried out by a model of that library."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr.images import VmaEntry
from ovr.images.pagemap import PAGEMAP_DTYPE
from ovr.images.vma import (
    MADV_DOFORK,
    MADV_NOHUGEPAGE,
    MAP_GROWSDOWN,
    PROT_READ,
    PROT_WRITE,
    VMA_ANON_PRIVATE,
    VMA_AREA_REGULAR,
    split_vma,
    vma_array,
)
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.ranges import RANGE, common, join, no_ranges, without
from ovr.plan.pool.layout import POOL_ADDRESS, Pool, fitting_pool
from ovr.plan.pool.table import Cold, Warm, foreign_cgroup, plan_warm
from ovr.plan.pool.units import TABLE_SPAN, UNIT

MIB = 1 << 20
RW = PROT_READ | PROT_WRITE
GIB = 1 << 30
PLENTY = Pool(1 << 40, "4.1.1", POOL_ADDRESS)
PLAIN, WITHOUT_WRITE, SERVE = range(3)


def ranges(*pairs):
    return np.array([*pairs], dtype=RANGE) if pairs else no_ranges()


def area(start, end, *, prot=RW, flags=0x22, madv=0):
    status = VMA_AREA_REGULAR | VMA_ANON_PRIVATE
    return VmaEntry(
        start=start, end=end, pgoff=0, shmid=0, prot=prot, flags=flags, status=status, fd=-1,
        madv=madv,
    )  # fmt: skip


def one(pid, areas, populated, *, ppid=0, pages=None):
    """A task as `plan_warm` sees it; unless `pages` says otherwise it has what is populated."""
    entries = np.zeros(len(pages if pages is not None else populated), PAGEMAP_DTYPE)
    for n, (start, end) in enumerate(pages if pages is not None else populated.tolist()):
        entries[n]["gva"], entries[n]["size"] = start, end - start
    memory = SimpleNamespace(name=f"pagemap-{pid}.img", pages_name=f"pages-{pid}.img",
                             entries=entries)  # fmt: skip
    task = SimpleNamespace(pid=pid, ppid=ppid, vmas=vma_array(areas, "mm"),
                           mm=SimpleNamespace(thp_disabled=False))  # fmt: skip
    return SimpleNamespace(task=task, memory=memory, pieces_of_criu=populated)


@dataclass
class Cow:
    inherited: dict[int, dict[int, np.ndarray]]

    @property
    def rooted(self):
        return self.inherited

    def inherited_from(self, pid):
        return join(*(roots[pid] for roots in self.inherited.values() if pid in roots))


def unrelated(plans):
    return Cow({plan.task.pid: {} for plan in plans})


def cut(areas, populated):
    """The areas as the inside image set has them."""
    return [
        piece
        for vma in areas
        for piece in split_vma(
            vma,
            sorted(
                {
                    int(edge)
                    for row in populated.tolist()
                    for edge in row
                    if vma.start < edge < vma.end
                }
            ),
        )
    ]


@dataclass
class Task:
    pid: int
    start: int
    end: int
    window: int
    base: int
    rows: list[tuple[int, int, int, int]]


def parsed(table):
    _, size, tasks, drops, rows = struct.unpack_from("<5Q", table)
    at = 40
    heads = [struct.unpack_from("<7Q", table, at + 56 * n) for n in range(tasks)]
    at += 56 * tasks
    dropped = [struct.unpack_from("<2Q", table, at + 16 * n) for n in range(drops)]
    at += 16 * drops
    all_rows = [struct.unpack_from("<4Q", table, at + 32 * n) for n in range(rows)]
    assert at + 32 * rows == len(table)
    found = [Task(*head[:5], all_rows[head[5] : head[5] + head[6]]) for head in heads]
    return size, found, ranges(*dropped)


def placed(task, pieces) -> Iterator[tuple[int, int, int, int]]:
    """The library's answers to CRIU's mmaps: address, size, place in the pool, how."""
    at = 0
    assert len(task.rows) == len(pieces)
    for (where, size, start, how), piece in zip(task.rows, pieces, strict=True):
        assert (where, size) == (at, piece.end - piece.start)
        assert bool(piece.madv >> MADV_DOFORK & 1) == (how == SERVE)
        yield piece.start, size, start, how
        at += size
    assert at == task.window


def check(plans, pieces, warm):
    """The table gives each task its own pages, and never those of another."""
    size, tasks, dropped = parsed(warm.table)
    given: list[tuple[int, int]] = []
    kept = 0
    by_pid = {plan.task.pid: plan for plan in plans}
    for task in tasks:
        plan = by_pid[task.pid]
        mine = ranges((task.start, task.end))
        for address, length, start, how in placed(task, pieces[task.pid]) if task.rows else ():
            if how != SERVE:
                continue
            assert (address - start) % UNIT == 0
            part = ranges((start, start + length))
            assert without(part, mine).size == 0
            given.append((start, start + length))
            filled = without(part, dropped)
            kept += int((filled["end"] - filled["start"]).sum())
            # Every page that comes along is one that the task has, and in a whole unit.
            for low, high in filled.tolist():
                there = ranges((low - start + address, high - start + address))
                assert without(there, plan.pieces_of_criu).size == 0
        spot = ranges((task.base, task.base + task.window))
        for vma in plan.task.vmas if task.rows else ():
            assert not common(spot, ranges((vma["start"], vma["end"]))).size
        parent = next((other for other in tasks if other.pid == plan.task.ppid), None)
        if parent:
            assert parent.start <= task.start <= task.end <= parent.end
            assert not common(spot, ranges((parent.base, parent.base + parent.window))).size
    ordered = sorted(given)
    assert all(end <= start for (_, end), (start, _) in pairwise(ordered))
    assert (dropped["start"] % UNIT == 0).all() and (dropped["end"] % UNIT == 0).all()
    assert all(end <= size for _, end in given)
    assert kept == warm.bytes
    assert sum(end - start for start, end in given) == warm.size


def planned(plans, cow=None, pool=PLENTY):
    pieces = {p.task.pid: cut(p.areas, p.pieces_of_criu) for p in plans}
    return pieces, plan_warm(plans, cow or unrelated(plans), pieces, pool)


def task_of(pid, areas, populated, **more):
    found = one(pid, areas, populated, **more)
    found.areas = areas
    return found


BASE = 0x7F00_0000_0000


def test_an_area_at_any_place():
    start = BASE + 7 * PAGE_SIZE
    areas = [area(0x400000, 0x403000, prot=PROT_READ), area(start, start + 9 * MIB)]
    plan = task_of(1, areas, ranges((start, start + 9 * MIB)))
    pieces, warm = planned([plan])
    check([plan], pieces, warm)
    assert warm.bytes == 6 * MIB  # 2 MiB at its begin and less than that at its end are not whole
    assert warm.size == 9 * MIB
    assert warm.images == ("pagemap-1.img", "pages-1.img")
    [task] = parsed(warm.table)[1]
    assert (task.base + task.rows[0][1] - start) % UNIT == 0  # so that huge pages stay whole


def test_the_largest_area_is_where_the_pool_has_it():
    small, large = (BASE, BASE + 4 * MIB), (BASE + 9 * MIB + PAGE_SIZE, BASE + 70 * MIB)
    areas = [area(0x400000, 0x403000, prot=PROT_READ), area(*small), area(*large)]
    plan = task_of(1, areas, ranges(small, large))
    pieces, warm = planned([plan])
    check([plan], pieces, warm)
    [task] = parsed(warm.table)[1]
    at_address = [
        task.base + at == POOL_ADDRESS + start for at, _, start, how in task.rows if how == SERVE
    ]
    sizes = [size for _, size, _, how in task.rows if how == SERVE]
    assert sum(size for size, there in zip(sizes, at_address, strict=True) if there) >= 60 * MIB


def large_and_small(start):
    spans = (BASE, BASE + 5 * MIB), (start, start + 3 * GIB + 7 * PAGE_SIZE)
    areas = [area(*span) for span in sorted(spans)]
    return task_of(1, areas, ranges(*sorted(spans)))


def apart(warm, pieces, pool):
    """How far from its final place modulo 1 GiB the largest area is in the pool."""
    [task] = parsed(warm.table)[1]
    start, size, at, _ = max(placed(task, pieces[1]), key=lambda p: p[1])
    assert size >= 3 * GIB - UNIT
    row = max(task.rows, key=lambda row: row[1])
    assert task.base + row[0] == pool.at + at  # and there CRIU's reservation has it
    return (start - pool.at - at) % GIB


@pytest.mark.parametrize("start", [0x1C00_3000, BASE + GIB - 9 * PAGE_SIZE, BASE + 5 * GIB])
@pytest.mark.parametrize("place", [0, 14 * MIB, GIB - UNIT])
def test_with_room_the_largest_area_lies_as_in_the_end(start, place):
    plan = large_and_small(start)
    pool = Pool(5 * GIB, "4.1.1", POOL_ADDRESS + place)
    pieces, warm = planned([plan], pool=pool)
    check([plan], pieces, warm)
    assert apart(warm, pieces, pool) == 0


def test_without_room_it_lies_as_it_comes():
    plan = large_and_small(BASE + 800 * MIB)
    pool = Pool(3 * GIB + 12 * MIB, "4.1.1", POOL_ADDRESS)
    pieces, warm = planned([plan], pool=pool)
    check([plan], pieces, warm)
    assert apart(warm, pieces, pool) % UNIT == 0 < apart(warm, pieces, pool)


@pytest.mark.parametrize("start", [0x1C00_3000, BASE + GIB - 9 * PAGE_SIZE, BASE + 5 * GIB])
def test_a_pool_that_fits(start):
    """No larger than it must be, and where the largest area needs it."""
    plan = large_and_small(start)
    cow = unrelated([plan])
    size, place = fitting_pool([plan], cow, {1: cut(plan.areas, plan.pieces_of_criu)})
    pool = Pool(size, "4.1.1", POOL_ADDRESS + place)
    assert 3 * GIB < pool.size <= 3 * GIB + 12 * MIB
    assert 0 <= pool.at - POOL_ADDRESS < TABLE_SPAN
    pieces, warm = planned([plan], pool=pool)
    check([plan], pieces, warm)
    assert parsed(warm.table)[0] == pool.size
    assert apart(warm, pieces, pool) == 0
    smaller = Pool(pool.size - UNIT, pool.criu, pool.at)
    assert "the tasks need" in planned([plan], pool=smaller)[1].why


def test_no_pool_fits_who_can_use_none():
    plan = task_of(1, [area(BASE, BASE + MIB)], ranges((BASE, BASE + MIB)))
    assert fitting_pool([plan], unrelated([plan]), {1: plan.areas}) is None


@pytest.mark.parametrize("at", [0, 1, POOL_ADDRESS + PAGE_SIZE, 1 << 47, (1 << 64) - 1])
def test_a_pool_that_claims_to_be_anywhere(at):
    plan = large_and_small(BASE + 800 * MIB)
    pieces, warm = planned([plan], pool=Pool(5 * GIB, "4.1.1", at))
    check([plan], pieces, warm)


def test_the_pool_stays_aside_where_the_task_has_areas():
    areas = [area(POOL_ADDRESS, POOL_ADDRESS + 8 * MIB)]
    plan = task_of(1, areas, ranges((POOL_ADDRESS, POOL_ADDRESS + 8 * MIB)))
    pieces, warm = planned([plan])
    check([plan], pieces, warm)
    assert warm.bytes == 8 * MIB


def test_small_holes_come_along_and_large_ones_do_not_pay():
    areas = [area(BASE, BASE + 20 * MIB), area(BASE + 30 * MIB, BASE + 60 * MIB)]
    held = ranges(
        (BASE, BASE + 5 * MIB), (BASE + 5 * MIB + PAGE_SIZE, BASE + 20 * MIB),
        (BASE + 30 * MIB, BASE + 36 * MIB),
    )  # fmt: skip
    plan = task_of(1, areas, held)
    pieces, warm = planned([plan])
    check([plan], pieces, warm)
    assert warm.size == 20 * MIB
    assert warm.bytes == 18 * MIB


@pytest.mark.parametrize(
    "other",
    [
        {"flags": 0x22 | 0x4000},  # not accounted for
        {"flags": 0x22 | MAP_GROWSDOWN},
        {"flags": 0x22 | 0x2000},  # locked
        {"madv": 1 << MADV_NOHUGEPAGE},
        {"prot": PROT_READ},
    ],
)
def test_other_areas_are_left_alone(other):
    areas = [area(BASE, BASE + 8 * MIB, **other)]
    plan = task_of(1, areas, ranges((BASE, BASE + 8 * MIB)))
    _, warm = planned([plan])
    assert warm == Cold("no area has enough units of 2 MiB to use a pool")


def test_a_task_that_wants_no_huge_pages():
    plan = task_of(1, [area(BASE, BASE + 8 * MIB)], ranges((BASE, BASE + 8 * MIB)))
    plan.task.mm.thp_disabled = True
    assert planned([plan])[1].why == "no area has enough units of 2 MiB to use a pool"


def test_what_a_child_inherits_is_left_alone():
    whole = ranges((BASE, BASE + 8 * MIB))
    own = ranges((BASE + 64 * MIB, BASE + 70 * MIB))
    areas = [area(*whole[0]), area(*own[0])]
    parent = task_of(1, areas[:1], whole)
    child = task_of(2, areas, join(whole, own), ppid=1)
    pieces, warm = planned([parent, child], Cow({1: {}, 2: {1: whole}}))
    check([parent, child], pieces, warm)
    assert warm.images == ("pagemap-2.img", "pages-2.img")
    assert warm.bytes == 6 * MIB
    # The same if only pieces of areas lie at the same place.
    pieces, warm = planned([parent, child])
    assert warm.bytes == 6 * MIB


def test_a_pool_that_is_too_small():
    plan = task_of(1, [area(BASE, BASE + 8 * MIB)], ranges((BASE, BASE + 8 * MIB)))
    _, warm = planned([plan], pool=Pool(6 * MIB, "4.1.1", POOL_ADDRESS))
    assert warm == Cold("the pool has 6 MiB, and the tasks need 8 MiB")


@pytest.mark.parametrize(("criu", "without"), [("3.17.1", [0]), ("4.1.1", [0, 1])])
def test_areas_without_pages_are_mapped_as_criu_maps_them(criu, without):
    """CRIU 3 takes the page behind an area for one of it, CRIU 4 does not."""
    areas = [
        area(0x10000, 0x12000, prot=PROT_READ),
        area(0x20000, 0x22000, prot=PROT_READ),
        area(0x22000, 0x24000, prot=PROT_READ),
        area(BASE, BASE + 4 * MIB),
        area(BASE + 8 * MIB, BASE + 9 * MIB, prot=PROT_READ),
    ]
    held = ranges((BASE, BASE + 4 * MIB))
    pages = [(0x22000, 0x23000), (BASE, BASE + 4 * MIB)]
    plan = task_of(1, areas, held, pages=pages)
    _, warm = planned([plan], pool=Pool(1 << 40, criu, POOL_ADDRESS))
    rows = parsed(warm.table)[1][0].rows
    assert [n for n, row in enumerate(rows) if row[3] == WITHOUT_WRITE] == without


@st.composite
def families(draw):
    count = draw(st.integers(1, 5))
    plans = []
    for pid in range(1, count + 1):
        at = BASE + draw(st.integers(0, 600)) * PAGE_SIZE + pid * (1 << 33)
        areas, held = [], []
        for _ in range(draw(st.integers(1, 4))):
            size = draw(st.integers(1, 3000)) * PAGE_SIZE
            areas.append(area(at, at + size, prot=draw(st.sampled_from([RW, RW, RW | 4, 1]))))
            edges = sorted(draw(st.sets(st.integers(0, size // PAGE_SIZE), max_size=6)))
            spans = [(at, at + size)] if draw(st.booleans()) else [
                (at + low * PAGE_SIZE, at + high * PAGE_SIZE)
                for low, high in zip(edges[::2], edges[1::2], strict=False)
            ]  # fmt: skip
            held += spans if areas[-1].prot & PROT_WRITE else []
            at += size + draw(st.integers(1, 600)) * PAGE_SIZE
        ppid = draw(st.integers(1, pid - 1)) if pid > 1 else 0
        plans.append(task_of(pid, areas, join(ranges(*held)), ppid=ppid))
    return plans


@settings(deadline=None, max_examples=200)
@given(families())
def test_any_family(plans):
    pieces, warm = planned(plans)
    if isinstance(warm, Warm):
        check(plans, pieces, warm)
    else:
        assert warm.why


class Message(SimpleNamespace):
    def HasField(self, name):
        return hasattr(self, name)


@pytest.mark.parametrize(
    ("sets", "options", "foreign"),
    [
        ([None, None], (), False),
        ([1, 1], (), False),
        ([1, 2], (), True),
        ([1, 2], ("--manage-cgroups=ignore",), False),
        ([1, 1], ("--cgroup-root=/x",), True),
    ],
)
def test_tasks_that_belong_into_another_cgroup(sets, options, foreign):
    def core(cg_set):
        return Message(tc=Message(), thread_core=Message(**({"cg_set": cg_set} if cg_set else {})))

    tasks = [SimpleNamespace(cores={1: core(cg_set)}) for cg_set in sets]
    images = SimpleNamespace(tasks=tasks, inventory=SimpleNamespace(root_cg_set=1))
    assert foreign_cgroup(images, options) == foreign
