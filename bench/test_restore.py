"""One process with much memory, restored by CRIU inside the VM, by CRIU on bare metal, by ovr.

Measured in turns, with the VM idle and loaded, next to the memcpy limit; pytest-benchmark is told
afterwards. `bench/README.md` says what the keys are.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from bench.bare import Bare, CannotRun
from bench.comparison import BARE, COLD, INSIDE, LIMIT, WARM, Lanes, idle_and_loaded
from bench.conftest import SMOKE
from bench.memcpy import MemcpyLimit
from bench.outside import PHASES
from bench.race import Heats, Lane, Replay, race, ratios, values
from ovr.lab.workload import build_workload

CLOCK = Replay()
STATES = ("idle", "loaded")
RUNNERS = (INSIDE, BARE, COLD, WARM, LIMIT)
SMALLEST = 64 << 20


@dataclass(frozen=True)
class Comparison:
    """Results by state of the VM, and what could not be measured."""

    heats: dict[str, Heats]
    notes: dict[str, str]

    def times(self, runner: str, state: str) -> list[float]:
        heats = self.heats[state]
        if runner == LIMIT:
            return values(heats, COLD, LIMIT)
        return values(heats, runner) if runner in heats else []


@pytest.fixture(scope="module")
def comparison(guest, size, rounds, results, tmp_path_factory):
    subject = guest.workload(size)
    notes = {}
    with MemcpyLimit(guest.vm, subject.images, subject.pid) as limit:
        lanes = Lanes(guest, subject, limit)
        inside = lanes.inside_vm()
        loaded_too = [lanes.cold()] if SMOKE else inside
        if not lanes.warm.exists:
            notes[WARM] = "this ovr has no warm skeleton"
        try:
            program = build_workload()
            scratch = tmp_path_factory.mktemp("bare")
            with Bare(
                subject.images, program, "/usr/local/bin/ovr-workload", subject.pid, scratch
            ) as bare:
                bare.run()
                results.conditions["host_criu"] = bare.version
                alone = Lane(BARE, bare.run, lanes.prepare_bare)
                idle, loaded = idle_and_loaded(guest, [*inside, alone], loaded_too, rounds)
        except CannotRun as error:
            notes[BARE] = str(error)
            idle, loaded = idle_and_loaded(guest, inside, loaded_too, rounds)
        results.put("memory.peak_anon", [lanes.peak_memory()], "bytes")
    guest.clear(subject)
    guest.forget(subject)
    found = Comparison({"idle": idle, "loaded": loaded}, notes)
    _keep(found, results)
    yield found


def _keep(found, results):
    for state, heats in found.heats.items():
        for name, laps in heats.items():
            results.put(f"{name}.{state}", values(heats, name))
            for measure in ("cpu", "start", "held", *PHASES):
                if measure in laps[0]:
                    results.put(f"{name}.{state}.{measure}", values(heats, name, measure))
        results.put(f"{LIMIT}.{state}", values(heats, COLD, LIMIT))
    for name, text in found.notes.items():
        for state in STATES:
            results.note(f"{name}.{state}", text)
    _keep_ratios(found, results)


def _keep_ratios(found, results):
    # One row for each sentence of the kind "so many times as fast as".
    for ours in (COLD, WARM):
        for state, heats in found.heats.items():
            if ours not in heats:
                continue
            times = values(heats, ours)
            for theirs in (INSIDE, BARE):
                other = found.times(theirs, "idle" if theirs == BARE else state)
                if other:
                    results.put(f"{ours}.{state}.times.{theirs}", ratios(other, times), "x")
            limit = values(heats, ours, LIMIT)
            results.put(
                f"{ours}.{state}.copy_of_limit",
                ratios(limit, values(heats, ours, "memory")), "x",
            )  # fmt: skip
            allowed = [2 * one + 0.2 for one in limit]
            results.put(f"{ours}.{state}.of_allowed", ratios(times, allowed), "x")
        if all(ours in heats for heats in found.heats.values()):
            slower = ratios(found.times(ours, "loaded"), found.times(ours, "idle"))
            results.put(f"{ours}.loaded.of_idle", slower, "x")


@pytest.mark.benchmark(group="restore", timer=CLOCK)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("runner", RUNNERS)
def test_restore(comparison, benchmark, runner, state):
    times = comparison.times(runner, state)
    if not times:
        pytest.skip(comparison.notes.get(runner, "not measured with the VM loaded"))
    CLOCK.tell(benchmark, times)
    if not SMOKE:
        benchmark.extra_info["rounds"] = times


@pytest.fixture(scope="module")
def curve(guest, size, rounds, results, comparison):
    """Time against size: powers of four up to the size of the comparison, which is the last."""
    times: dict[str, dict[int, list[float]]] = {}
    for step in _sizes(size):
        subject = guest.workload(step)
        with MemcpyLimit(guest.vm, subject.images, subject.pid) as limit:
            lanes = Lanes(guest, subject, limit, checks=False).inside_vm()
            heats = race(lanes, rounds)
        guest.clear(subject)
        guest.forget(subject)
        for path in subject.images.iterdir():
            path.unlink()
        for name in heats:
            times.setdefault(name, {})[step] = values(heats, name)
        times.setdefault(LIMIT, {})[step] = values(heats, COLD, LIMIT)
    for name, by_size in times.items():
        by_size[size] = comparison.times(name, "idle")
        for step, laps in by_size.items():
            results.put(f"size.{name}.{step >> 20}M", laps)
    return times


def _sizes(size):
    steps = []
    step = SMALLEST
    while step < size:
        steps.append(step)
        step *= 4
    return steps


@pytest.mark.parametrize("name", (COLD, WARM))
def test_linear(curve, name, results):
    """Fit a line through the medians: the fixed part, and the distance of the medians from it."""
    if name not in curve or len(curve[name]) < 3:
        pytest.skip("not enough sizes" if name in curve else "this ovr has no warm skeleton")
    sizes = np.array(sorted(curve[name]), float)
    medians = np.array([np.median(curve[name][int(one)]) for one in sizes])
    # Relative errors count: a line that only fits the largest size would say nothing.
    slope, fixed = np.polyfit(sizes, medians, 1, w=1 / medians)
    off = np.abs(medians / (slope * sizes + fixed) - 1).max()
    results.put(f"size.{name}.fixed", [float(fixed)])
    results.put(f"size.{name}.per_gb", [float(slope * 1e9)])
    results.put(f"size.{name}.off_line", [float(off)], "x")
