"""One restore, dump or move, and a victim that is killed at one point of it."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ovr import lab
from ovr.errors import AgentUnreachable, OvrError
from tests import subject
from tests.kill.steps import Point, Step

__all__ = [
    "DUMP", "MOVE", "ON_THE_HOST", "RESTORE", "TRACER", "Attempt", "Event", "Story", "events_of",
    "kind_of", "name_of", "perform", "points",
]  # fmt: skip

PATIENCE = 180.0  # seconds for it to come to its end, whatever was killed: CRIU may hang for 120
IN_THE_GUEST = ("agent", "hook", "criu", "root", "task")
OF_THE_TREE = ("hook", "criu", "root", "task")
OF_A_MOVE = ("agent", "criu", "hook", "qemu")
ON_THE_HOST = ("ovr", "tracer", "all")
TRACER = "ovr-hold"  # prctl(PR_SET_NAME) in native/tracer.c
GO = "sending go"


@dataclass(frozen=True)
class Story:
    """Events that a restore, dump or move has.

    Attributes:
        victims: processes that take part. Those of a move's guests end in ``-a`` (the source) or
            ``-b`` (the destination).
        busy: after these the guest works, and nothing tells the host how far it is.
        lives: events between which there is a victim that is not there all the time.
        late: the share of points some time after an event in `busy`.
        dense: from this event on are two thirds of the other points; empty: they are spread evenly.
    """

    victims: tuple[str, ...]
    busy: tuple[str, ...]
    lives: Mapping[str, tuple[str, str]]
    late: float = 0.3
    dense: str = ""


def _in_one_vm(begun: str, held: str) -> Story:
    return Story(
        victims=(*ON_THE_HOST, *IN_THE_GUEST, "qemu"),
        busy=(begun, f"after {GO}"),
        lives=dict.fromkeys(OF_THE_TREE, (held, f"after {GO}")),
    )


RESTORE = _in_one_vm("after sending begin", "end of skeleton")
DUMP = _in_one_vm("after sending track and stop", "end of start")
MOVE = Story(
    victims=(
        *ON_THE_HOST, *(f"{victim}-{side}" for victim in OF_A_MOVE for side in "ab")
    ),
    busy=(
        "after b sending go", "after a sending prepare", "after a sending go",
        "after a sending track and stop", "after b sending begin",
    ),
    lives={
        "hook-a": ("end of stop", "after a sending go"),
        "criu-a": ("end of start", "after a sending go"),
        "hook-b": ("end of skeleton", "after b sending go"),
        "criu-b": ("end of pool", "after b sending go"),
    },
    late=0.5,
    dense="begin of commit",
)  # fmt: skip


@dataclass(frozen=True)
class Event:
    """A step of one restore, dump or move.

    Attributes:
        held: whether a VM is stopped meanwhile.
        step: which one it is.
        at: seconds since it began.
    """

    held: bool
    step: Step
    at: float

    @property
    def name(self) -> str:
        """What it is."""
        return self.step.name


class Attempt:
    """A restore, dump or move in a process of its own.

    Args:
        command: module of `restorer`, `dumper` or `mover`, with its arguments but for the last.
        step: the one to wait at, if any.
        scratch: an empty directory for its temporary files.
    """

    def __init__(self, command: Sequence[str], step: Step | None, scratch: Path) -> None:
        self._log = (scratch.parent / "restorer.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, str(step or "")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env={**os.environ, "TMPDIR": str(scratch)}, bufsize=0,
        )  # fmt: skip
        self._step = step
        self._started = time.monotonic()
        self._input = b""
        self.events: list[Event] = []
        self.last = ""
        """Its last message: done, or failed and why; empty if it was killed."""

    def waits(self) -> bool:
        """Read what it tells until it waits at its step; False if it ended before."""
        deadline = time.monotonic() + PATIENCE
        while not self.events or self.events[-1].step != self._step:
            if not self._read(deadline):
                return False
        return True

    def go_on(self) -> None:
        """Let it go on from where it waits."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed
            self.process.stdin.write(b"\n")

    def finish(self) -> None:
        """Wait for its end, and read the rest."""
        deadline = time.monotonic() + PATIENCE
        try:
            while self._read(deadline):
                pass
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()

    @property
    def said_go(self) -> bool:
        """Whether it may have told the agent to let the tree run."""
        return any(event.name.endswith(GO) for event in self.events)

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

    def _read(self, deadline: float) -> bool:
        line = self._line(deadline)
        if line is None:
            return False
        if line.startswith("event "):
            _, number, held, step = line.split(" ", 3)
            assert int(number) == len(self.events), line
            at = time.monotonic() - self._started
            self.events.append(Event(held == "1", Step.parse(step), at))
        else:
            self.last = line
        return True

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
    """Restore, dump or move once without harm, and return the events."""
    attempt = Attempt(command, None, scratch)
    try:
        attempt.finish()
        assert attempt.last == "done", f"{attempt.last}: {attempt.errors}"
        return attempt.events
    finally:
        attempt.close()


def points(events: list[Event], victim: str, count: int, story: Story) -> list[Point]:
    """Spread points over that part of a restore, dump or move in which there is such a victim.

    Some are at events. The others are some time after the messages upon which the guest works: CRIU
    builds or dumps the tree, and lets it go, and nothing tells the host how far it is. What runs in
    the guest cannot be killed while the VM is held.
    """
    names = [event.name for event in events]
    first, last = story.lives.get(victim, (names[0], names[-1]))
    there = range(names.index(first), names.index(last) + 1)
    free = [n for n in there if not (kind_of(victim) in IN_THE_GUEST and events[n].held)]
    late = max(int(count * story.late), 1)
    numbers = _spread(free, count - late, names.index(story.dense) if story.dense else None)
    found = [(number, 0.0) for number in numbers]
    for place, words in enumerate(story.busy):
        number = names.index(words)
        span = events[number + 2].at - events[number].at
        share = len(range(place, late, len(story.busy)))
        found += [(number, span * (i + 0.5) / share) for i in range(share)]
    return [Point(events[number].step, delay) for number, delay in sorted(found)]


def _spread(free: Sequence[int], count: int, dense: int | None) -> list[int]:
    if dense is not None:
        close = [number for number in free if number >= dense]
        many = -(-2 * count // 3)
        return _spread(free, count - many, None) + _spread(close, many, None)
    return [free[round((i + 0.5) * len(free) / count - 0.5)] for i in range(count)]


def kind_of(victim: str) -> str:
    """Return what a victim is, without the VM that it is in."""
    return victim.partition("-")[0]


def kill(vms: Sequence[lab.LabVm], victim: str, attempt: Attempt) -> bool:
    """Kill the victim; False if there was none at that moment.

    Raises:
        AgentUnreachable: the guest's agent cannot be asked to do it.
    """
    if victim in ON_THE_HOST:
        return kill_here(victim, attempt)
    vm = vms[1 if victim.endswith("-b") else 0]
    kind = kind_of(victim)
    if kind == "qemu":
        os.kill(vm.pid, signal.SIGKILL)
        return True
    with vm.connect() as agent:
        try:
            return subject.kill(agent, kind)
        except AgentUnreachable:
            if kind == "agent":
                return True  # it cannot tell
            raise


def kill_here(victim: str, attempt: Attempt) -> bool:
    """Kill `ovr`, what holds a VM for it, or itself and everything that it started."""
    ovr = attempt.process.pid
    started = descendants(ovr)
    if victim == "tracer":
        tracers = sorted(pid for pid in started if name_of(pid) == TRACER)
        # Of a move's two, now the one and now the other.
        pids = [tracers[len(attempt.events) % len(tracers)]] if tracers else []
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
    vms: Sequence[lab.LabVm],
    command: Sequence[str],
    victim: str,
    point: Point,
    scratch: Path,
    *,
    before: Callable[[Attempt], None] = lambda attempt: None,
) -> tuple[Attempt, bool]:
    """Run it, and kill the victim at that point; returns how it went, and whether it met one.

    `before` is called while it waits at the point's step.
    """
    attempt = Attempt(command, point.step, scratch)
    try:
        met = False
        if attempt.waits():
            # A guest that is stopped kills nobody.
            assert not (attempt.events[-1].held and kind_of(victim) in IN_THE_GUEST), (
                f"a VM is held at {point}, where {victim} was to be killed"
            )
            before(attempt)
            if point.delay:
                attempt.go_on()
                time.sleep(point.delay)
            met = kill(vms, victim, attempt)
            attempt.go_on()
        attempt.finish()
    except (AssertionError, OvrError) as error:
        error.add_note(f"after {attempt.events[-1:]}: {attempt.last or attempt.errors}")
        attempt.close()
        raise
    return attempt, met
