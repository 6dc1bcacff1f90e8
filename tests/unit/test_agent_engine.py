"""A restore by a container engine, with the real agent: CRIU is somebody else's child."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovr.errors import AttemptFailed, CriuFailed
from ovr.guest import protocol
from ovr.guest.client.agent import Agent
from ovr.guest.client.results import HeldTree
from ovr.guest.codes import Code
from tests.unit.agent_host import (
    IMAGES,
    AgentHost,
    agent_dies,
    alive,
    fails,
    hook_dies,
    kill,
    wait_for,
)

ARCHIVE = {protocol.ENGINE_ARCHIVE: b"all of it"}


@pytest.fixture
def agent(host: AgentHost) -> Iterator[Agent]:
    with host.connect() as agent:
        yield agent


def begin(host: AgentHost, agent: Agent, mode: str = "ok", **options: float) -> HeldTree:
    return agent.begin(
        ARCHIVE, criu_options=host.criu_options(mode), engine="podman", volumes=["one", "two"],
        **options,
    )  # fmt: skip


def assert_gone(host: AgentHost, skeleton: HeldTree) -> None:
    """No task ran, none is left, the engine has cleaned up, and the next restore succeeds."""
    wait_for(lambda: not alive(*skeleton.tasks, skeleton.criu_pid))
    wait_for(lambda: not host.restores)
    assert not host.marks
    assert not host.containers
    with host.connect() as other:
        again = begin(host, other)
        assert other.go().container == "c0ffee"
        wait_for(lambda: host.marks == set(again.tasks))
    kill(*again.tasks)


def test_engines_are_found(agent: Agent) -> None:
    assert "podman" in agent.hello.engines


def test_go(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    assert f"TracerPid:\t{skeleton.criu_pid}\n" in status(skeleton.root_pid)
    assert "State:\tT" in status(skeleton.criu_pid)
    (container,) = host.containers
    assert (container / "userdata" / "checkpoint" / "pagemap-1.img").read_bytes() == b"all of it"
    time.sleep(0.2)
    assert not host.marks
    restored = agent.go()
    assert (restored.pid, restored.container) == (skeleton.root_pid, "c0ffee")
    wait_for(lambda: host.marks == set(skeleton.tasks))
    assert not host.restores
    kill(*skeleton.tasks)


def status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def test_abort_and_again(host: AgentHost, agent: Agent) -> None:
    for _ in range(2):
        skeleton = begin(host, agent)
        agent.abort()
        # When abort() returns it is over, for the engine too.
        assert not alive(*skeleton.tasks, skeleton.criu_pid)
        assert not host.containers
        assert not host.restores
        assert (host.directory / "removed").read_text() == "volume rm -- one two"
    assert_gone(host, skeleton)


def test_link_breaks(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    agent.close()
    assert_gone(host, skeleton)


def test_host_is_silent(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent, silence=0.4)
    wait_for(lambda: not alive(*skeleton.tasks))
    with fails(Code.SILENT):
        agent.go()
    agent.ping()
    assert_gone(host, skeleton)


def test_nobody_else_while_the_engine_cleans_up(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    agent._send(protocol.Abort())
    for message in (protocol.Abort(), protocol.Go(), protocol.Alive()):
        agent._send(message)  # one answer is enough
    with pytest.raises(AttemptFailed) as caught:
        agent.go()
    assert caught.value.code == Code.HOST
    assert_gone(host, skeleton)


def test_hook_dies(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    hook_dies(host, agent, skeleton)
    assert_gone(host, skeleton)


def test_criu_is_killed_while_it_holds_the_tree(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    kill(skeleton.criu_pid)
    wait_for(lambda: not alive(*skeleton.tasks))
    with fails(Code.CRIU):
        agent.go()
    agent.ping()


def test_agent_dies(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    agent_dies(host, agent, skeleton)


def test_agent_is_told_to_end(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    host.process.terminate()
    assert host.process.wait() == 0
    wait_for(lambda: not alive(*skeleton.tasks, skeleton.criu_pid))
    assert not host.marks


@pytest.mark.parametrize("engine", [None, "podman"])
def test_it_makes_progress(host: AgentHost, agent: Agent, engine: str | None) -> None:
    """Large trees take long."""
    skeleton = agent.begin(
        ARCHIVE if engine else IMAGES, criu_options=host.criu_options("slow"), engine=engine,
        stall=2.5,
    )  # fmt: skip
    agent.go()
    kill(*skeleton.tasks)


def test_it_makes_no_progress(host: AgentHost, agent: Agent) -> None:
    with pytest.raises(AttemptFailed) as caught:
        begin(host, agent, "stalled", stall=2.0)
    assert caught.value.code == Code.STALLED
    assert not host.marks
    assert not host.restores
    assert not host.containers


def test_criu_fails(host: AgentHost, agent: Agent) -> None:
    """Its log is gone by then, as with podman; the agent has it open."""
    with pytest.raises(CriuFailed, match=r"podman in the guest failed.*Error .*too late"):
        begin(host, agent, "fail-built")
    assert not host.restores
    assert not host.containers
    agent.ping()


def test_without_the_hook_nothing_is_restored(host: AgentHost, agent: Agent) -> None:
    with pytest.raises(CriuFailed, match="podman in the guest failed"):
        begin(host, agent, "no-config")
    assert not host.marks
    assert not (host.directory / "removed").exists()  # whose container it is nobody has told


def test_the_engine_fails_after_go(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent, "fail-late")
    with pytest.raises(CriuFailed, match="CRIU failed"):
        agent.go()
    assert not alive(*skeleton.tasks)


def test_no_such_engine(host: AgentHost, agent: Agent) -> None:
    (host.directory / "podman").unlink()
    if any(Path(place, "podman").exists() for place in os.environ["PATH"].split(":")):
        pytest.skip("there is a podman here")
    with fails(Code.START):
        begin(host, agent)
    wait_for(lambda: not host.restores)
    with host.connect() as other, fails(Code.ENGINE):
        other.begin(ARCHIVE, engine="/bin/sh")
