"""Measure variants in turn, round after round, so that a disturbance hits all of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Measures = Mapping[str, float]
"""The figures of one heat; ``seconds`` is among them."""


def nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Lane:
    """One variant.

    Attributes:
        name: of the variant.
        run: one heat; measures itself.
        prepare: what must be true before, and is not measured.
        once: after the first heat: a check that takes long.
    """

    name: str
    run: Callable[[], Measures]
    prepare: Callable[[], None] = nothing
    once: Callable[[], None] = nothing


Heats = dict[str, list[Measures]]


def race(lanes: Sequence[Lane], rounds: int) -> Heats:
    """Run all lanes `rounds` times, each round beginning with another one."""
    heats: Heats = {lane.name: [] for lane in lanes}
    for number in range(rounds):
        start = number % len(lanes)
        for lane in (*lanes[start:], *lanes[:start]):
            lane.prepare()
            heats[lane.name].append(lane.run())
            if number == 0:
                lane.once()
    return heats


def values(heats: Heats, lane: str, measure: str = "seconds") -> list[float]:
    """Return the figures of a lane in each round."""
    return [heat[measure] for heat in heats[lane]]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return `over` by `under`, round by round."""
    return [one / other for one, other in zip(over, under, strict=True)]


class Replay:
    """A timer and a function for pytest-benchmark, which give it the times of a race.

    pytest-benchmark runs all rounds of one benchmark before the next; ours are interleaved. So
    they are measured first, and then told.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tell(self, benchmark, seconds: Sequence[float]) -> None:
        """Have `benchmark` report these times."""
        left = iter(seconds)

        def heat() -> None:
            self.now += next(left)

        benchmark.pedantic(heat, rounds=len(seconds))
