"""Show the progress of a restore: a bar on a terminal, JSON lines for other programs, or nothing.

A restore reports each phase to a `Stopwatch`, and the bytes done by `Stopwatch.advance`. The two
subclasses here print these reports when they get them, without a thread.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TextIO

from ovr.attempt.stopwatch import Stopwatch
from ovr.cli.output import size
from ovr.cli.terminal import is_lively

__all__ = ["PROGRESS_MODES", "BarWatch", "JsonWatch", "make_watch"]

PROGRESS_MODES: Final = ("auto", "bar", "json", "none")

_SILENT_SECONDS: Final = 0.5
_BETWEEN_SECONDS: Final = 0.1
_BAR_WIDTH: Final = 30


class _Watch(Stopwatch):
    # Calls `_show` at most ten times a second, but always at the begin and the end of a phase.
    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._stream = stream
        self._now = now
        self._begun = now()
        self._shown = 0.0
        self._phase = ""
        self._done = self._total = 0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure the body of the ``with`` as `phase`, and show its begin and end."""
        self._phase, self._done, self._total = phase, 0, 0
        self._show(self._now() - self._begun)
        with super().__call__(phase):
            yield
        self._show(self._now() - self._begun)

    def advance(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of this phase are done."""
        self._done, self._total = done, total
        now = self._now()
        if now - self._shown >= _BETWEEN_SECONDS or done == total:
            self._shown = now
            self._show(now - self._begun)

    def end(self) -> None:
        """Remove the output from the stream, if it is a terminal."""

    def _show(self, seconds: float) -> None:
        raise NotImplementedError


class BarWatch(_Watch):
    """Draw one line on a terminal, after half a second, and erase it at the end."""

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, now)
        self._drawn = False

    def end(self) -> None:
        """Erase the line."""
        if self._drawn:
            self._write("")

    def _show(self, seconds: float) -> None:
        if seconds < _SILENT_SECONDS:
            return
        self._drawn = True
        line = f"{self._phase:<9}{seconds:6.1f} s"
        if self._total:
            share = min(self._done / self._total, 1.0)
            full = round(_BAR_WIDTH * share)
            bar = "█" * full + "░" * (_BAR_WIDTH - full)
            line += f"  {bar} {share:4.0%} of {size(self._total)}"
        self._write(line[: shutil.get_terminal_size().columns - 1])

    def _write(self, line: str) -> None:
        self._stream.write(f"\r\x1b[K{line}")
        self._stream.flush()


class JsonWatch(_Watch):
    """Print a JSON object per line: ``ovr.progress/1``."""

    def _show(self, seconds: float) -> None:
        event = {
            "schema": "ovr.progress/1",
            "phase": self._phase,
            "seconds": round(seconds, 6),
            "done": self._done,
            "total": self._total,
        }
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()


@contextmanager
def make_watch(mode: str) -> Iterator[Stopwatch]:
    """Yield a stopwatch that shows progress on stderr in one of `PROGRESS_MODES`."""
    if mode == "json":
        yield JsonWatch(sys.stderr)
    elif mode == "bar" or (mode == "auto" and is_lively(sys.stderr)):
        watch = BarWatch(sys.stderr)
        try:
            yield watch
        finally:
            watch.end()
    else:
        yield Stopwatch()
