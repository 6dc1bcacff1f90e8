"""How long each phase took."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Span", "Stopwatch", "rounded", "timeline"]


@dataclass(frozen=True)
class Span:
    """A piece of time: what it was spent on, and seconds since the stopwatch was made."""

    name: str
    start: float
    end: float


class Stopwatch:
    """Seconds by phase, in the order in which the phases began.

    Attributes:
        seconds: by phase, and what was added.
        spans: when it was; a phase may have come more than once.
        start: when it was made, as time.perf_counter() has it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.spans: list[Span] = []
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure the body of the ``with`` as `phase`."""
        start = self.total()
        try:
            yield
        finally:
            self.spans.append(Span(phase, start, self.total()))
            self.add(phase, self.total() - start)

    def add(self, phase: str, seconds: float) -> None:
        """Add to what `phase` took."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def advance(self, done: int, total: int) -> None:
        """Do nothing; a subclass may show that `done` of `total` bytes of a phase are done."""

    def span(self, name: str, start: float, end: float) -> Span:
        """Return a span for times of time.perf_counter()."""
        return Span(name, start - self.start, end - self.start)

    def counter(self, total: int) -> Callable[[int], None]:
        """Return a function that adds bytes done to the progress of a phase of `total` bytes."""
        done = 0

        def add(count: int) -> None:
            nonlocal done
            done += count
            self.advance(done, total)

        return add

    def total(self) -> float:
        """Return the seconds since the stopwatch was made."""
        return time.perf_counter() - self.start


def rounded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields for JSON, with seconds to the microsecond."""
    return {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in fields.items()
    }


def timeline(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Return when each phase was, for JSON."""
    return [rounded({"phase": span.name, "start": span.start, "end": span.end}) for span in spans]
