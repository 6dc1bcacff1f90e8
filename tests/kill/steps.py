"""Steps of a restore, dump or move, and points in it that the next one has, too."""

from collections import Counter
from dataclasses import dataclass
from typing import Self

__all__ = ["Point", "Step", "Steps"]

_PHASE = ("begin of ", "end of ")
_BETWEEN = "/"


@dataclass(frozen=True)
class Step:
    """A step, by that which is the same in each run.

    The same move has a dozen holds more in one run than in the next, so a step has no number among
    all of them: in another run that number is inside a hold.

    Attributes:
        phase: the last phase that has begun or ended.
        name: what it is.
        nth: how many steps with that name there were before in that phase.
    """

    phase: str
    name: str
    nth: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the step that `str` has made that text of."""
        phase, name, nth = text.split(_BETWEEN)
        return cls(phase, name, int(nth))

    def __str__(self) -> str:
        return _BETWEEN.join((self.phase, self.name, str(self.nth)))


class Steps:
    """Makes steps of the names of one run."""

    def __init__(self) -> None:
        self._phase = ""
        self._counts: Counter[tuple[str, str]] = Counter()

    def __call__(self, name: str) -> Step:
        if name.startswith(_PHASE):
            self._phase = name
        step = Step(self._phase, name, self._counts[self._phase, name])
        self._counts[self._phase, name] += 1
        return step


@dataclass(frozen=True)
class Point:
    """When to kill.

    Attributes:
        step: after this one.
        delay: seconds after it; 0 is while it is waited in.
    """

    step: Step
    delay: float = 0.0

    def __str__(self) -> str:
        if self.delay:
            return f"{self.delay * 1000:.0f} ms {self.step.name}"
        return str(self.step)
