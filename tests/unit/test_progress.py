"""Progress and colours: on terminals that want them, nowhere else."""

import io
import json
import os
import pty
import subprocess
import sys

import pytest

from ovr.attempt.stopwatch import Stopwatch
from ovr.cli import progress
from ovr.cli.progress import BarWatch, JsonWatch, make_watch
from ovr.cli.terminal import painted


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_nothing_is_drawn_within_half_a_second(clock):
    stream = io.StringIO()
    watch = BarWatch(stream, clock)
    for phase in ("attach", "plan", "memory"):
        with watch(phase):
            clock.now += 0.1
            watch.advance(1, 2)
    watch.end()
    assert stream.getvalue() == ""
    assert list(watch.seconds) == ["attach", "plan", "memory"]


def test_a_bar(clock):
    stream = io.StringIO()
    watch = BarWatch(stream, clock)
    with watch("memory"):
        clock.now = 0.6
        watch.advance(256 << 20, 1 << 30)
        clock.now = 0.65
        watch.advance(300 << 20, 1 << 30)  # too soon
        clock.now = 1.0
        watch.advance(1 << 30, 1 << 30)
    watch.end()
    first, second, _, last = stream.getvalue().split("\r\x1b[K")[1:]
    assert first == f"memory      0.6 s  {'█' * 8}{'░' * 22}  25% of 1.0 GiB"
    assert second == f"memory      1.0 s  {'█' * 30} 100% of 1.0 GiB"
    assert last == ""  # wiped off


def test_a_narrow_terminal(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = io.StringIO()
    watch = BarWatch(stream, clock)
    clock.now = 1
    with watch("memory"):
        watch.advance(1, 2)
    assert max(len(line) for line in stream.getvalue().split("\r\x1b[K")) == 19


def test_json_lines(clock):
    stream = io.StringIO()
    watch = JsonWatch(stream, clock)
    with watch("attach"):
        clock.now = 0.25
    with watch("memory"):
        clock.now = 0.5
        watch.advance(5, 5)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert {event["schema"] for event in events} == {"ovr.progress/1"}
    assert [(e["phase"], e["seconds"], e["done"], e["total"]) for e in events] == [
        ("attach", 0.0, 0, 0), ("attach", 0.25, 0, 0),
        ("memory", 0.25, 0, 0), ("memory", 0.5, 5, 5), ("memory", 0.5, 5, 5),
    ]  # fmt: skip


def test_an_error_wipes_the_bar_off(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", stream)
    monkeypatch.setattr(progress, "_SILENT_SECONDS", 0)
    with pytest.raises(ValueError, match="x"), make_watch("bar") as watch, watch("memory"):
        raise ValueError("x")
    assert stream.getvalue().endswith("\r\x1b[K")


def test_auto_is_silent_in_a_pipe():
    with make_watch("auto") as watch:
        assert type(watch) is Stopwatch


def on_a_terminal(code, **environment):
    """Return the output of a Python program whose stdout and stderr are a terminal."""
    leader, terminal = pty.openpty()
    env = {**os.environ, "TERM": "xterm", **environment}
    command = [sys.executable, "-c", code]
    subprocess.run(command, stdout=terminal, stderr=terminal, env=env, check=True)
    os.close(terminal)
    text = os.read(leader, 4096).decode()
    os.close(leader)
    return text


ERROR = (
    "from ovr.cli import output; from ovr.errors import OvrError; "
    "output.error(OvrError('no'), as_json=False)"
)
WATCH = (
    "from ovr.cli.progress import make_watch\n"
    "with make_watch('auto') as watch: print(type(watch).__name__)"
)


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"NO_COLOR": ""}, "\x1b[31movr:\x1b[0m no\r\n"),
        ({"NO_COLOR": "1"}, "ovr: no\r\n"),
        ({"NO_COLOR": "", "TERM": "dumb"}, "ovr: no\r\n"),
    ],
)
def test_colours(environment, text):
    assert on_a_terminal(ERROR, **environment) == text


@pytest.mark.parametrize(("term", "kind"), [("xterm", "BarWatch"), ("dumb", "Stopwatch")])
def test_a_bar_on_a_terminal(term, kind):
    assert on_a_terminal(WATCH, TERM=term).strip() == kind


def test_no_colours_in_a_pipe():
    assert painted("x", "good", io.StringIO()) == "x"
