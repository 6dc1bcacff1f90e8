"""The same bytes in other shapes: one area, ten thousand areas, a tree of a hundred processes."""

import pytest

from bench.comparison import COLD, INSIDE, WARM, Lanes
from bench.conftest import SMOKE
from bench.race import Replay, race, ratios

CLOCK = Replay()
AREAS, PROCESSES = (50, 4) if SMOKE else (10_000, 100)
SHAPES = {"one": ("areas", 1), "areas": ("areas", AREAS), "tree": ("tree", PROCESSES)}
if SMOKE:
    del SHAPES["areas"]


@pytest.fixture(scope="module")
def shapes(guest, size, rounds, results):
    """By shape and lane, the seconds of all rounds; the shapes take turns, too."""
    each = min(max(size // 4, 16 << 20), 1 << 30)
    subjects = {shape: guest.shape(*SHAPES[shape], each) for shape in SHAPES}
    lanes = {shape: _lanes(guest, shape, subject) for shape, subject in subjects.items()}
    times: dict[str, dict[str, list[float]]] = {shape: {} for shape in SHAPES}
    for _ in range(rounds):
        for shape, entrants in lanes.items():
            for name, heats in race(entrants, 1).items():
                times[shape].setdefault(name, []).append(heats[0]["seconds"])
            guest.clear(subjects[shape])
    results.put("shape.bytes", [each], "bytes")
    for shape, by_lane in times.items():
        guest.forget(subjects[shape])
        for name, seconds in by_lane.items():
            results.put(f"shape.{shape}.{name}", seconds)
            results.put(f"shape.{shape}.{name}.of_one", ratios(seconds, times["one"][name]), "x")
    return times


def _lanes(guest, shape, subject):
    made = Lanes(guest, subject)
    if SMOKE:
        return [made.cold()]
    # A pool gives whole 2 MiB, which small areas have none of, and small tasks hardly any.
    return made.inside_vm() if shape == "one" else [made.inside(), made.cold()]


@pytest.mark.benchmark(group="shapes of memory", timer=CLOCK)
@pytest.mark.parametrize("name", (INSIDE, COLD, WARM))
@pytest.mark.parametrize("shape", SHAPES)
def test_shape(shapes, benchmark, shape, name):
    if name not in shapes[shape]:
        pytest.skip("not measured: no warm skeleton, or a smoke run")
    CLOCK.tell(benchmark, shapes[shape][name])
