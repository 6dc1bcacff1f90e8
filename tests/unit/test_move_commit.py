"""The commit of a move: whatever fails, at most one of the two trees runs."""

from types import SimpleNamespace

import pytest

from ovr.errors import (
    AgentUnreachable,
    AttemptFailed,
    CheckFailed,
    CriuFailed,
    MoveInDoubt,
    UsageError,
    VmUnreachable,
)
from ovr.guest.client.results import Outcome
from ovr.move import commit as commit_module
from ovr.move.commit import Commit
from ovr.move.decide import decide

MOVE = "0123456789abcdef" * 2
ROOT = 4242


class Side:
    """An attempt that aborts when it is left, unless it was committed or left as it is."""

    def __init__(self, name, events, failing=()):
        self.name, self.events, self.failing = name, events, dict(failing)
        self.agent = self
        self.vm = SimpleNamespace(kernel=None, check_same_boot=lambda: None)
        self.to_abort = True

    def fail(self, step):
        if step in self.failing:
            raise self.failing[step]

    def prepare(self, move):
        assert move == MOVE
        self.fail("prepare")
        self.events.append("source is frozen")

    def archive(self, save):
        self.fail("archive")
        self.events.append("archived")
        save(b"archive")

    def commit(self, go):
        self.fail("before go")
        self.to_abort = False
        return go(self)

    def go(self):
        self.fail("go")
        self.events.append("destination runs")
        self.fail("after go")
        return "restored"

    def end_dump(self):
        self.fail("end")
        self.events.append("source ended")
        return b"stats"

    def keep(self):
        self.to_abort = False

    def leave(self):
        self.to_abort = False
        self.events.append(f"{self.name} is left")

    def abort(self):
        self.to_abort = False
        self.fail("abort")
        self.events.append(f"{self.name} aborted")

    def close(self):
        if self.to_abort:
            self.events.append(f"{self.name} aborted")


@pytest.fixture
def events():
    return []


def nothing(commit):
    pass


def archive(commit):
    commit.archive(lambda data: None)


def run(
    monkeypatch, events, source=(), destination=(), *, there=False, find=None, meanwhile=nothing
):
    """Commit, and leave both attempts as the story does; return the result."""
    monkeypatch.setattr(
        commit_module, "Agent", SimpleNamespace(end_dump=lambda agent: agent.end_dump())
    )
    task = SimpleNamespace(mm=True) if there else None
    monkeypatch.setattr(commit_module, "find_task", find or (lambda kernel, pid: task))
    one, other = Side("source", events, source), Side("destination", events, destination)
    try:
        with Commit(one, other, MOVE) as commit:
            commit.prepare()
            meanwhile(commit)
            return commit.run(ROOT, lambda agent: agent.go())
    finally:
        other.close()
        one.close()


def test_one_after_the_other(monkeypatch, events):
    assert run(monkeypatch, events) == ("restored", b"stats")
    assert events == ["source is frozen", "destination runs", "source ended"]


def test_a_container(monkeypatch, events):
    assert run(monkeypatch, events, meanwhile=archive) == ("restored", b"stats")
    assert events == ["source is frozen", "archived", "destination runs", "source ended"]


def test_a_container_whose_podman_fails(monkeypatch, events):
    """Its agent has put it back: there is nothing left to be aborted."""
    failing = {"archive": CriuFailed("podman failed"), "abort": AttemptFailed("nothing to abort")}
    with pytest.raises(CriuFailed):
        run(monkeypatch, events, source=failing, meanwhile=archive)
    assert "destination runs" not in events


def test_a_container_whose_archive_does_not_come(monkeypatch, events):
    failing = {"archive": AgentUnreachable("gone"), "abort": AgentUnreachable("gone")}
    with pytest.raises(MoveInDoubt) as caught:
        run(monkeypatch, events, source=failing, meanwhile=archive)
    assert "--back" in caught.value.hint


@pytest.mark.parametrize("error", [UsageError("disk full"), KeyboardInterrupt()])
def test_a_container_that_cannot_be_built(monkeypatch, events, error):
    def fail(commit):
        archive(commit)
        raise error

    with pytest.raises(type(error)):
        run(monkeypatch, events, meanwhile=fail)
    assert events == ["source is frozen", "archived", "source aborted", "destination aborted"]


def test_a_source_that_cannot_be_frozen(monkeypatch, events):
    with pytest.raises(AttemptFailed):
        run(monkeypatch, events, source={"prepare": AttemptFailed("no cgroup")})
    assert events == ["destination aborted", "source aborted"]


@pytest.mark.parametrize(
    "error", [CheckFailed("being migrated"), AttemptFailed("rebooted"), KeyboardInterrupt()]
)
def test_a_destination_that_was_not_told(monkeypatch, events, error):
    with pytest.raises(type(error)):
        run(monkeypatch, events, destination={"before go": error})
    assert events == ["source is frozen", "source aborted", "destination aborted"]


@pytest.mark.parametrize("error", [AgentUnreachable("the link broke"), KeyboardInterrupt()])
def test_a_source_that_may_be_frozen(monkeypatch, events, error):
    with pytest.raises(MoveInDoubt) as caught:
        run(monkeypatch, events, source={"prepare": error})
    assert "--back" in caught.value.hint
    assert events == ["source is left", "destination aborted"]


@pytest.mark.parametrize("when", ["before go", "go"])
def test_a_source_that_does_not_say_that_it_runs_on(monkeypatch, events, when):
    lost = {"abort": AgentUnreachable("the link broke")}
    with pytest.raises(MoveInDoubt) as caught:
        run(monkeypatch, events, source=lost, destination={when: AttemptFailed("CRIU failed")})
    assert "--back" in caught.value.hint
    assert "destination runs" not in events


def test_a_source_that_does_not_run_as_before(monkeypatch, events):
    damaged = {"abort": AttemptFailed("it may not run as before")}
    with pytest.raises(AttemptFailed) as caught:
        run(monkeypatch, events, source=damaged, destination={"go": AttemptFailed("CRIU failed")})
    assert caught.value is damaged["abort"]


def test_a_destination_that_says_it_failed_and_has_nothing(monkeypatch, events):
    with pytest.raises(AttemptFailed):
        run(monkeypatch, events, destination={"go": AttemptFailed("CRIU failed")})
    assert events == ["source is frozen", "source aborted"]


def test_a_destination_that_says_it_failed_and_has_the_tree(monkeypatch, events):
    with pytest.raises(MoveInDoubt) as caught:
        run(monkeypatch, events, destination={"go": AttemptFailed("?")}, there=True)
    assert caught.value.move == MOVE
    assert events == ["source is frozen", "source is left"]


@pytest.mark.parametrize("second", [KeyboardInterrupt(), SystemExit(1), LookupError("pid table")])
def test_a_look_for_the_tree_that_is_cut_off(monkeypatch, events, second):
    """Whatever ends it, the source's tree does not run on: that of the destination may run."""

    def cut_off(kernel, pid):
        raise second

    failed = {"after go": AttemptFailed("it is still held")}
    with pytest.raises(MoveInDoubt) as caught:
        run(monkeypatch, events, destination=failed, find=cut_off)
    assert caught.value.move == MOVE
    assert events == ["source is frozen", "destination runs", "source is left"]


def test_a_source_that_is_interrupted_while_it_is_taken_back(monkeypatch, events):
    with pytest.raises(MoveInDoubt) as caught:
        run(
            monkeypatch, events,
            source={"abort": KeyboardInterrupt()}, destination={"go": AttemptFailed("CRIU failed")},
        )  # fmt: skip
    assert "--back" in caught.value.hint and caught.value.move == MOVE


@pytest.mark.parametrize(
    "error", [AgentUnreachable("the link broke"), VmUnreachable("QEMU"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("when", ["go", "after go"])
@pytest.mark.parametrize("there", [False, True])
def test_a_destination_that_may_run(monkeypatch, events, error, when, there):
    with pytest.raises(MoveInDoubt) as caught:
        run(monkeypatch, events, destination={when: error}, there=there)
    assert caught.value.exit_code == 9 and "--finish" in caught.value.hint
    assert "source aborted" not in events and "source ended" not in events
    assert events[-1] == "source is left"


@pytest.mark.parametrize(
    "error", [AgentUnreachable("the link broke"), AttemptFailed("CRIU failed"), KeyboardInterrupt()]
)
def test_a_source_that_does_not_end(monkeypatch, events, error):
    with pytest.raises(MoveInDoubt):
        run(monkeypatch, events, source={"end": error})
    assert events == ["source is frozen", "destination runs", "source is left"]


class Doubtful:
    """The agents of both sides after a move that was cut off."""

    def __init__(self, doubts=(MOVE,), released=False, held=False):
        self.agent = self
        self.hello = SimpleNamespace(boot_id="source")
        self.found, self.outcome, self.events = doubts, Outcome(released, held), []
        self.there = SimpleNamespace(hello=SimpleNamespace(boot_id="destination"), moved=self.moved)

    def doubts(self):
        return self.found

    def moved(self, move):
        assert move in self.found
        return self.outcome

    def adopt(self, move):
        self.events.append(f"adopted {move[:1]}")

    def end_dump(self):
        self.events.append("ended")

    def abort(self):
        self.events.append("runs on")


@pytest.mark.parametrize(
    ("released", "finish", "end"), [(True, True, "ended"), (False, False, "runs on")]
)
def test_the_destination_decides(released, finish, end):
    both = Doubtful(released=released)
    assert decide(both, both.there, None, finish=finish) == MOVE
    assert both.events == ["adopted 0", end]


@pytest.mark.parametrize(
    ("released", "held", "finish", "code"),
    [
        (True, False, False, "released"),
        (False, False, True, "not-released"),
        (False, True, True, "held"),
        (False, True, False, "held"),
    ],
)
def test_a_decision_against_the_destination(released, held, finish, code):
    both = Doubtful(released=released, held=held)
    with pytest.raises(CheckFailed) as caught:
        decide(both, both.there, None, finish=finish)
    assert caught.value.code == code
    assert not both.events


def test_a_destination_that_is_gone():
    both = Doubtful()
    with pytest.raises(UsageError):
        decide(both, None, None, finish=True)
    assert not both.events
    decide(both, None, None, finish=False)
    assert both.events == ["adopted 0", "runs on"]


@pytest.mark.parametrize("finish", [True, False])
def test_the_source_is_not_asked_what_the_destination_did(finish):
    """It says truly that it never let the moved tree run, and both trees would run."""
    both = Doubtful(released=finish)
    with pytest.raises(UsageError) as caught:
        decide(both, both, None, finish=finish)
    assert caught.value.code == "same-vm"
    assert not both.events


def test_nothing_is_in_doubt():
    both = Doubtful(doubts=())
    for wanted in (None, MOVE):
        with pytest.raises(UsageError) as caught:
            decide(both, both.there, wanted, finish=True)
        assert caught.value.code == "no-doubt"


def test_one_of_several_is_named():
    other = "f" * 32
    both = Doubtful(doubts=(MOVE, other), released=True)
    with pytest.raises(UsageError) as caught:
        decide(both, both.there, None, finish=True)
    assert caught.value.code == "several-doubts"
    assert decide(both, both.there, other, finish=True) == other
    assert both.events == ["adopted f", "ended"]
