"""The same process where the guest has single, scattered 4 KiB pages only.

How much of the memcpy limit over the same scattered pages is left, and how fast their page tables
are walked, beside drgn.
"""

import time

import drgn
import numpy as np
import pytest
from drgn.helpers.linux.mm import follow_phys

from bench.comparison import COLD, LIMIT, Lanes
from bench.memcpy import MemcpyLimit
from bench.outside import PHASES
from bench.race import Heats, Lane, Replay, race, ratios, values
from ovr._fastcopy import OWNED, PIECE
from ovr.attempt.in_holds import HOLD_BYTES
from ovr.kernel import find_task, for_each_vma, mm_space
from ovr.memory.extents import split, total
from ovr.vm.attach import AttachedVm
from tests.vm.drgn_reader import drgn_program

CLOCK = Replay()
SCATTERED = "scattered"
WALK, WALK_OWNED, DRGN = "walk", "walk_owned", "drgn"
DRGN_PAGES = 10_000
WALK_ROUNDS = 9
"""More than of restores: each takes a fraction of a second."""


@pytest.fixture(scope="module")
def heats(guest, size, rounds, results):
    subject = guest.workload(size)
    guest.forget(subject)
    with guest.fragmented(size):
        with MemcpyLimit(guest.vm, subject.images, subject.pid) as limit:
            found = race([Lanes(guest, subject, limit).cold()], rounds)
        with AttachedVm(f"lab:{guest.vm.name}") as attached:
            found |= race(_walks(attached, subject.pid, results), WALK_ROUNDS)
        guest.clear(subject)
    _keep(found, results)
    return found


def _keep(found: Heats, results) -> None:
    results.put(f"{COLD}.{SCATTERED}", values(found, COLD))
    for phase in ("cpu", *PHASES):
        results.put(f"{COLD}.{SCATTERED}.{phase}", values(found, COLD, phase))
    limit = values(found, COLD, LIMIT)
    results.put(f"{LIMIT}.{SCATTERED}", limit)
    share = ratios(limit, values(found, COLD, "memory"))
    results.put(f"{COLD}.{SCATTERED}.copy_of_limit", share, "x")
    for lane in (WALK, WALK_OWNED, DRGN):
        results.put(f"{lane}.per_second", values(found, lane, "rate"), "pages/s")
    results.put(
        "walk.times.drgn", ratios(values(found, WALK, "rate"), values(found, DRGN, "rate")), "x"
    )


def _walks(attached, pid, results) -> list[Lane]:
    # Lanes that walk the page tables of the restored process. Seconds are of CPU time.
    kernel = attached.kernel
    task = find_task(kernel, pid)
    areas = [(int(vma.vm_start), int(vma.vm_end)) for vma in for_each_vma(task.mm)]
    start, end = max(areas, key=lambda area: area[1] - area[0])
    space = mm_space(kernel, task.mm)
    piece = np.array([(start, end - start, 0)], PIECE)
    parts = list(split(piece, HOLD_BYTES))  # as a restore walks them
    small = 4096 * len(space.walk(piece)) / (end - start)
    results.put("walk.small_pages", [small], "x")
    theirs = drgn.Object(drgn_program(attached), "struct task_struct", address=task.address_)
    sample = range(start, end, max((end - start) // DRGN_PAGES >> 12 << 12, 4096))

    def walk(frames) -> dict[str, float]:
        begin = time.thread_time()
        found = [space.walk(part, frames) for part in parts]
        seconds = time.thread_time() - begin
        assert sum(map(total, found)) == end - start
        assert frames is None or all((runs["flags"] & OWNED).all() for runs in found)
        return {"seconds": seconds, "rate": ((end - start) >> 12) / seconds}

    def walk_drgn() -> dict[str, float]:
        mm = theirs.mm
        begin = time.thread_time()
        found = [int(follow_phys(mm, address)) for address in sample]
        seconds = time.thread_time() - begin
        assert found[-1] == space.translate(sample[-1])
        return {"seconds": seconds, "rate": len(sample) / seconds}

    return [
        Lane(WALK, lambda: walk(None)),
        Lane(WALK_OWNED, lambda: walk(kernel.private_frames)),
        Lane(DRGN, walk_drgn),
    ]


@pytest.mark.benchmark(group="scattered 4 KiB pages", timer=CLOCK)
@pytest.mark.parametrize("name", (COLD, LIMIT))
def test_scattered(heats, benchmark, name):
    CLOCK.tell(benchmark, values(heats, COLD, LIMIT if name == LIMIT else "seconds"))


@pytest.mark.benchmark(group="page walk", timer=CLOCK)
@pytest.mark.parametrize("name", (WALK, WALK_OWNED, DRGN))
def test_walk(heats, benchmark, name):
    CLOCK.tell(benchmark, values(heats, name))
    benchmark.extra_info["per_second"] = max(values(heats, name, "rate"))
