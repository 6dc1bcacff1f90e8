"""One restore or dump, and a victim that is killed at one point of it."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ovr import lab
from ovr.errors import AgentUnreachable, OvrError
from tests import subject

__all__ = [
    "DUMP", "ON_THE_HOST", "RESTORE", "TRACER", "VICTIMS", "Attempt", "Event", "Point", "Story",
    "events_of", "name_of", "perform", "points",
]  # fmt: skip

PATIENCE = 180.0  # seconds for it to come to its end, whatever was killed: CRIU may hang for 120
IN_THE_GUEST = ("agent", "hook", "criu", "root", "task")
OF_THE_TREE = ("hook", "criu", "root", "task")
ON_THE_HOST = ("ovr", "tracer", "all")
VICTIMS = (*ON_THE_HOST, *IN_THE_GUEST, "qemu")
TRACER = "ovr-hold"  # prctl(PR_SET_NAME) in native/tracer.c
GO = "sending go"


@dataclass(frozen=True)
class Story:
    """Events that a restore or dump has.

    Attributes:
        begun: after this CRIU works, and nothing tells the host how far it is.
        held: from this on CRIU and its hook hold the tree.
    """

    begun: str
    held: str


RESTORE = Story("after sending begin", "end of skeleton")
DUMP = Story("after sending track and stop", "end of start")


@dataclass(frozen=True)
class Event:
    """A step of a restore or dump.

    Attributes:
        held: whether the VM is stopped meanwhile.
        name: what it is.
        at: seconds since it began.
    """

    held: bool
    name: str
    at: float


@dataclass(frozen=True)
class Point:
    """When to kill.

    Attributes:
        event: its number.
        delay: seconds after it; 0 is while it is waited in.
        name: for people.
    """

    event: int
    delay: float
    name: str


class Attempt:
    """A restore or dump in a process of its own.

    Args:
        command: module of `restorer` or `dumper`, with its arguments but for the last.
        event: the number of the event to wait at, or -1.
        scratch: an empty directory for its temporary files.
    """

    def __init__(self, command: Sequence[str], event: int, scratch: Path) -> None:
        self._log = (scratch.parent / "restorer.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, str(event)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env={**os.environ, "TMPDIR": str(scratch)}, bufsize=0,
        )  # fmt: skip
        self._started = time.monotonic()
        self._input = b""
        self.events: list[Event] = []
        self.last = ""
        """Its last message: done, or failed and why; empty if it was killed."""

    def read_up_to(self, event: int) -> bool:
        """Read what it tells until that event has come; False when it ended before."""
        deadline = time.monotonic() + PATIENCE
        while len(self.events) <= event:
            line = self._line(deadline)
            if line is None:
                return False
            if line.startswith("event "):
                _, number, held, name = line.split(" ", 3)
                assert int(number) == len(self.events), line
                self.events.append(Event(held == "1", name, time.monotonic() - self._started))
            else:
                self.last = line
        return True

    def go_on(self) -> None:
        """Let it go on from where it waits."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed
            self.process.stdin.write(b"\n")

    def finish(self) -> None:
        """Wait for its end, and read the rest."""
        try:
            self.read_up_to(1 << 30)
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()

    @property
    def said_go(self) -> bool:
        """Whether it may have told the agent to let the tree run."""
        return any(GO in event.name for event in self.events)

    @property
    def errors(self) -> str:
        """Its stderr."""
        self._log.seek(0)
        return self._log.read()

    def close(self) -> None:
        """Give everything back."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._log):
            assert stream is not None
            stream.close()

    def _line(self, deadline: float) -> str | None:
        assert self.process.stdout is not None
        while b"\n" not in self._input:
            left = max(0.0, deadline - time.monotonic())
            readable = select.select([self.process.stdout], [], [], left)[0]
            assert readable, f"it does not come to an end after {self.events[-1:]}: {self.errors}"
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                return None
            self._input += data
        line, _, self._input = self._input.partition(b"\n")
        return line.decode()


def events_of(command: Sequence[str], scratch: Path) -> list[Event]:
    """Restore or dump once without harm, and return the events."""
    attempt = Attempt(command, -1, scratch)
    try:
        attempt.finish()
        assert attempt.last == "done", f"{attempt.last}: {attempt.errors}"
        return attempt.events
    finally:
        attempt.close()


def points(events: list[Event], victim: str, count: int, story: Story = RESTORE) -> list[Point]:
    """Spread points over that part of a restore or dump in which there is such a victim.

    Most are at events. The others are some time after its begin and "go": CRIU builds or dumps the
    tree, and lets it go, and nothing tells the host how far it is. What runs in the guest cannot be
    killed while the VM is held.
    """
    names = [event.name for event in events]
    built, gone = names.index(story.held), names.index(f"after {GO}")
    there = range(built, gone + 1) if victim in OF_THE_TREE else range(len(events))
    free = [n for n in there if not (victim in IN_THE_GUEST and events[n].held)]
    late = max(count * 3 // 10, 1)
    exact = count - late
    numbers = [free[round((i + 0.5) * len(free) / exact - 0.5)] for i in range(exact)]
    found = [Point(number, 0.0, names[number]) for number in numbers]
    building = -(-late // 2)
    for words, share in ((story.begun, building), (f"after {GO}", late - building)):
        number = names.index(words)
        span = events[number + 2].at - events[number].at
        for delay in (span * (i + 0.5) / share for i in range(share)):
            found.append(Point(number, delay, f"{delay * 1000:.0f} ms {words}"))
    return sorted(found, key=lambda point: (point.event, point.delay))


def kill(vm: lab.LabVm, victim: str, attempt: Attempt) -> bool:
    """Kill the victim; False if there was none at that moment."""
    if victim in ON_THE_HOST:
        return kill_here(victim, attempt.process.pid)
    if victim == "qemu":
        os.kill(vm.pid, signal.SIGKILL)
        return True
    try:
        return subject.kill(vm, victim)
    except AgentUnreachable:
        if victim == "agent":
            return True  # it cannot tell
        raise


def kill_here(victim: str, ovr: int) -> bool:
    """Kill `ovr`, what holds the VM for it, or itself and everything that it started."""
    started = descendants(ovr)
    if victim == "tracer":
        pids = [pid for pid in started if name_of(pid) == TRACER]
    else:
        pids = [ovr, *(started if victim == "all" else ())]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(pids)


def descendants(pid: int) -> list[int]:
    """Processes that a process started, that these started, and so on."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def name_of(pid: int) -> str:
    """The name of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def perform(
    vm: lab.LabVm, command: Sequence[str], victim: str, point: Point, scratch: Path
) -> tuple[Attempt, bool]:
    """Run it, and kill the victim at that point; returns how it went, and whether it met one."""
    attempt = Attempt(command, point.event, scratch)
    try:
        met = False
        if attempt.read_up_to(point.event):
            if point.delay:
                attempt.go_on()
                time.sleep(point.delay)
            met = kill(vm, victim, attempt)
            attempt.go_on()
        attempt.finish()
    except (AssertionError, OvrError):
        attempt.close()
        raise
    return attempt, met
