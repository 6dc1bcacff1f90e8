"""Points of `tests.kill`: the step that was meant is the one at which the victim is killed."""

import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ovr import lab
from ovr.errors import AgentUnreachable
from ovr.lab.agent import Completed
from ovr.lab.qemu import Hardware
from tests.kill import check
from tests.kill.attempt import Attempt, Event, Story, events_of, kill, perform, points
from tests.kill.place import crashes
from tests.kill.steps import Point, Step
from tests.unit.agent_host import state_of, wait_for

ROOT = Path(__file__).parents[2]
FEW, MANY = 2, 5  # holds
GO = "after sending go"
NONE = cast(Attempt, None)  # a victim in a guest is killed without
IN_THE_GUEST = ("agent-a", "criu-a")
STORY = Story(victims=("ovr",), busy=(GO,), lives={})


@pytest.fixture(autouse=True)
def in_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let modules of the tests be found by another Python."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    path = tmp_path / "scratch"
    path.mkdir()
    return path


def command(holds: int) -> list[str]:
    return ["tests.unit.kill_stand_in", str(holds)]


def go_in(events: list[Event]) -> Event:
    return next(event for event in events if event.name == GO)


class FalseAgent:
    """A session of a lab agent."""

    def __init__(self, run: Callable[[], Completed]) -> None:
        self._run = run

    def __enter__(self) -> "FalseAgent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, argv: Sequence[str], **_: Any) -> Completed:
        return self._run()


class FalseVm:
    """A VM whose agent does one thing when a session begins, and one to run a command."""

    def __init__(self, connect: Callable[[], None], run: Callable[[], Completed]) -> None:
        self._connect, self._run = connect, run

    def connect(self) -> FalseAgent:
        self._connect()
        return FalseAgent(self._run)


def vm(connect: Callable[[], None], run: Callable[[], Completed]) -> lab.LabVm:
    return cast(lab.LabVm, FalseVm(connect, run))


def answers() -> None:
    pass


def fails() -> Any:
    raise AgentUnreachable("there is no answer")


def killed() -> Completed:
    return Completed(0, b"killed 1\n", b"")


@pytest.mark.parametrize("holds", [FEW, MANY])
def test_other_holds_before_it(holds: int, scratch: Path) -> None:
    go = go_in(events_of(command(FEW), scratch))
    waited: list[str] = []
    attempt, met = perform(
        [], command(holds), "ovr", Point(go.step), scratch,
        before=lambda attempt: waited.append(attempt.events[-1].name),
    )  # fmt: skip
    attempt.close()
    assert met
    assert waited == [GO]
    assert attempt.last == ""  # it has not come to its end


def test_the_steps_of_one_run_differ(scratch: Path) -> None:
    steps = [event.step for event in events_of(command(MANY), scratch)]
    assert len({*steps}) == len(steps)
    assert [Step.parse(str(step)) for step in steps] == steps


def test_a_step_that_does_not_come(scratch: Path) -> None:
    last_hold = [event for event in events_of(command(MANY), scratch) if event.held][-1]
    attempt, met = perform([], command(FEW), "ovr", Point(last_hold.step), scratch)
    attempt.close()
    assert not met
    assert attempt.last == "done"


def test_points_are_in_order(scratch: Path) -> None:
    planned = events_of(command(FEW), scratch)
    found = points(planned, "ovr", 6, STORY)
    numbers = [[event.step for event in planned].index(point.step) for point in found]
    assert len(found) == 6
    assert numbers == sorted(numbers)
    assert [point.step.name for point in found if point.delay] == [GO]


@pytest.mark.parametrize("victim", IN_THE_GUEST)
def test_nobody_is_killed_in_a_guest_that_is_held(victim: str, scratch: Path) -> None:
    asked: list[str] = []
    hold = next(event for event in events_of(command(FEW), scratch) if event.held)
    false_vm = vm(lambda: asked.append(victim), killed)
    with pytest.raises(AssertionError, match="held"):
        perform([false_vm], command(FEW), victim, Point(hold.step), scratch)
    assert not asked


@pytest.mark.parametrize("victim", IN_THE_GUEST)
def test_an_agent_that_cannot_be_asked(victim: str) -> None:
    with pytest.raises(AgentUnreachable):
        kill([vm(fails, killed)], victim, NONE)


def test_an_agent_that_has_killed_itself() -> None:
    assert kill([vm(answers, fails)], "agent-a", NONE)
    with pytest.raises(AgentUnreachable):
        kill([vm(answers, fails)], "criu-a", NONE)


def test_a_failure_says_where(scratch: Path) -> None:
    go = go_in(events_of(command(FEW), scratch))
    with pytest.raises(AgentUnreachable) as failure:
        perform([vm(fails, killed)], command(FEW), "criu-a", Point(go.step), scratch)
    assert any(GO in note for note in failure.value.__notes__)


@pytest.mark.parametrize("ends", [True, False])
def test_a_tracer_that_is_dying(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no command line any more, and what it holds is let go a moment later."""
    monkeypatch.setattr(check, "PATIENCE", 30.0 if ends else 0.5)
    with subprocess.Popen(["/bin/sleep", "inf"]) as qemu:
        qemu.send_signal(signal.SIGSTOP)
        wait_for(lambda: state_of(qemu.pid) == "T")
        asked: list[int] = []
        try:
            if ends:
                check.not_held(held_vm(qemu, asked))
            else:
                with pytest.raises(AssertionError, match="held"):
                    check.not_held(cast(lab.LabVm, SimpleNamespace(name="", pid=qemu.pid, alive=1)))
        finally:
            qemu.kill()


def held_vm(qemu: "subprocess.Popen[bytes]", asked: list[int]) -> lab.LabVm:
    """A VM that is let go when it is looked at for the second time."""

    class Held:
        name, alive = "", True

        @property
        def pid(self) -> int:
            asked.append(qemu.pid)
            if len(asked) == 2:
                qemu.send_signal(signal.SIGCONT)
            return qemu.pid

    return cast(lab.LabVm, Held())


def test_a_crash_of_the_vsock_device(tmp_path: Path) -> None:
    hardware = Hardware(1 << 30, 2, "tcg", None, 1)
    one = lab.LabVm(
        "one", "trixie", hardware, tmp_path / "qmp", "", "", tmp_path / "console.log", ()
    )
    assert crashes(one) == []
    one.console.write_text("ready\nOops: int3: 0000\n")
    panic = "thread 'vring_worker' (7) panicked at src/vsock_conn.rs:238:64:"
    (tmp_path / "vsock.log").write_text(f"\n{panic}\ncalled `Result::unwrap()`\n")
    assert crashes(one) == ["Oops: int3: 0000", panic]
