"""The commit of a move with the real agent, in its destination: has its tree run here?"""

import os
import signal
from pathlib import Path

import pytest

from ovr.errors import AgentUnreachable, AttemptFailed
from ovr.guest import move_protocol
from ovr.guest.client.results import HeldTree, Outcome
from ovr.guest.codes import Code
from ovr.lab.agent import LabAgent
from tests.unit.agent_host import (
    IMAGES,
    AgentHost,
    alive,
    fails,
    hook_dies,
    kill,
    one_link,
    restarted,
    wait_for,
)
from tests.unit.move_host import new_id

NOTHING = Outcome(released=False, held=False)
HELD = Outcome(released=False, held=True)
RELEASED = Outcome(released=True, held=False)


def begin(host: AgentHost, agent: LabAgent, move: str | None) -> HeldTree:
    return agent.begin(IMAGES, criu_options=host.criu_options(), move=move)


def markers(host: AgentHost) -> set[str]:
    return {path.name for path in (host.directory / "run" / "moved").glob("*")}


def test_go(host: AgentHost, agent: LabAgent) -> None:
    move = new_id()
    assert agent.moved(move) == NOTHING
    skeleton = begin(host, agent, move)
    assert agent.moved(move) == HELD
    assert agent.moved(new_id()) == NOTHING
    with host.connect() as other:
        assert other.moved(move) == HELD
    agent.go()
    assert agent.moved(move) == RELEASED
    wait_for(lambda: host.marks == set(skeleton.tasks))
    kill(*skeleton.tasks)


@one_link
def test_what_comes_to_nothing(host: AgentHost, agent: LabAgent) -> None:
    move = new_id()
    skeleton = begin(host, agent, move)
    agent.abort()
    assert agent.moved(move) == NOTHING
    skeleton = begin(host, agent, move)
    agent.close()
    wait_for(lambda: not alive(*skeleton.tasks))
    with host.connect() as other:
        wait_for(lambda: other.moved(move) == NOTHING)
        skeleton = begin(host, other, move)
        hook_dies(host, other, skeleton)
    with host.connect() as other:
        assert other.moved(move) == NOTHING
    assert not host.marks


@one_link
def test_the_hook_dies_as_the_host_says_go(host: AgentHost, agent: LabAgent) -> None:
    """Either way the outcome says what has happened."""
    for _ in range(5):
        with host.connect() as other:
            skeleton = begin(host, other, move := new_id())
            os.kill(host.hook(skeleton.criu_pid), signal.SIGKILL)  # and do not wait
            try:
                other.go()
                outcome = RELEASED
            except AttemptFailed:
                outcome = NOTHING
        assert agent.moved(move) == outcome
        if outcome.released:
            wait_for(lambda tree=skeleton.tasks: host.marks >= set(tree))
            kill(*skeleton.tasks)
        else:
            assert not set(skeleton.tasks) & host.marks


@one_link
def test_the_next_agent_knows(host: AgentHost, agent: LabAgent) -> None:
    move = new_id()
    skeleton = begin(host, agent, move)
    agent.go()
    kill(host.process.pid)
    host.process.wait()
    with pytest.raises(AgentUnreachable):
        agent.ping()
    with restarted(host), host.connect() as other:
        assert other.moved(move) == RELEASED
        assert other.moved(new_id()) == NOTHING
    kill(*skeleton.tasks)


@one_link
def test_a_tree_that_has_run_before(host: AgentHost, agent: LabAgent) -> None:
    """A move ends once."""
    move = new_id()
    first = begin(host, agent, move)
    agent.go()
    wait_for(lambda: host.marks == set(first.tasks))
    kill(*first.tasks)
    second = begin(host, agent, move)
    with fails(Code.OUTCOME):
        agent.go()
    assert not alive(*second.tasks)
    assert not set(second.tasks) & host.marks
    assert agent.moved(move) == RELEASED


@one_link
def test_what_cannot_be_recorded(host: AgentHost, agent: LabAgent) -> None:
    """Then the tree does not run."""
    (host.directory / "run" / "moved").write_text("in the way")
    skeleton = begin(host, agent, move := new_id())
    with fails(Code.OUTCOME):
        agent.go()
    assert not alive(*skeleton.tasks)
    assert not host.marks
    assert agent.moved(move) == NOTHING
    skeleton = begin(host, agent, None)
    agent.go()
    kill(*skeleton.tasks)


@one_link
def test_the_newest_are_kept(host: AgentHost, agent: LabAgent) -> None:
    directory = host.directory / "run" / "moved"
    directory.mkdir()
    older = [new_id() for _ in range(move_protocol.MOVES_KEPT + 3)]
    for number, move in enumerate(older):
        (directory / move).touch()
        os.utime(directory / move, (number, number))
    skeleton = begin(host, agent, move := new_id())
    agent.go()
    kill(*skeleton.tasks)
    assert markers(host) == {*older[4:], move}
    assert len(markers(host)) == move_protocol.MOVES_KEPT
    assert Path(directory / move).stat().st_mode & 0o777 == 0o600


@one_link
@pytest.mark.parametrize("move", ["", "../moved", "A" * 32, "0" * 31])
def test_an_invalid_id(host: AgentHost, agent: LabAgent, move: str) -> None:
    with fails(Code.PROTOCOL):
        begin(host, agent, move)
    assert not host.marks
