"""A restore with the real agent that comes to nothing: abort, and every way to die."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from ovr.errors import AttemptFailed, CriuFailed, PidTaken
from ovr.guest import protocol
from ovr.guest.client.agent import Agent
from ovr.guest.codes import Code
from tests.unit.agent_host import (
    IMAGES,
    AgentHost,
    agent_dies,
    agent_host,
    agent_program,
    alive,
    assert_gone,
    begin,
    fails,
    hook_dies,
    kill,
    one_link,
    wait_for,
)


def test_abort_and_again(host: AgentHost, agent: Agent) -> None:
    for _ in range(3):
        skeleton = begin(host, agent)
        agent.abort()
        # When abort() returns it is over.
        assert not alive(*skeleton.tasks, skeleton.criu_pid)
        assert not host.restores
    assert_gone(host, skeleton)


def test_link_breaks(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    agent.close()
    assert_gone(host, skeleton)


def test_host_is_silent(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent, silence=0.4)
    with agent.keep_alive(0.1):
        time.sleep(1)
    assert alive(*skeleton.tasks)
    wait_for(lambda: not alive(*skeleton.tasks))
    with fails(Code.SILENT):
        agent.go()
    agent.ping()
    assert_gone(host, skeleton)


def test_the_agent_itself_stood_still(host: AgentHost, agent: Agent) -> None:
    """The host spoke meanwhile: what it sent is read before its silence is judged."""
    skeleton = begin(host, agent, silence=0.4)
    with agent.keep_alive(0.1):
        for _ in range(2):
            host.process.send_signal(signal.SIGSTOP)
            time.sleep(0.8)
            host.process.send_signal(signal.SIGCONT)
            time.sleep(0.2)
        agent.ping()
    assert alive(*skeleton.tasks)
    agent.abort()
    assert_gone(host, skeleton)


def test_hook_dies(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    hook_dies(host, agent, skeleton)
    assert_gone(host, skeleton)


def test_hook_dies_as_the_host_says_go(host: AgentHost, agent: Agent) -> None:
    # Either event may be handled first: all of the tree runs, or nothing of it ever did.
    for _ in range(5):
        skeleton = begin(host, agent)
        os.kill(host.hook(skeleton.criu_pid), signal.SIGKILL)  # and do not wait
        try:
            agent.go()
        except AttemptFailed:
            agent.ping()
            assert_gone(host, skeleton)
        else:
            wait_for(lambda tasks=skeleton.tasks: host.marks == set(tasks))
            kill(*skeleton.tasks)
        for mark in (host.directory / "marks").iterdir():
            mark.rmdir()


def test_criu_is_killed_while_it_holds_the_tree(host: AgentHost, agent: Agent) -> None:
    # The kernel kills its tracees before anybody else hears of it.
    for _ in range(5):
        skeleton = begin(host, agent)
        kill(skeleton.criu_pid)
        wait_for(lambda tasks=skeleton.tasks: not alive(*tasks))
        with fails(Code.CRIU):
            agent.go()
        agent.ping()
        assert not host.marks
    assert_gone(host, skeleton)


def test_criu_is_killed_and_nobody_looks(host: AgentHost, agent: Agent) -> None:
    # Agent and hook are stopped: it is the kernel that kills the tree.
    skeleton = begin(host, agent)
    others = (host.process.pid, host.hook(skeleton.criu_pid))
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        kill(skeleton.criu_pid)
        wait_for(lambda: not alive(*skeleton.tasks))
    finally:
        for pid in reversed(others):  # the agent kills the hook as soon as it runs
            os.kill(pid, signal.SIGCONT)
    assert not host.marks
    # The agent hears of both at once, in this order or the other.
    with pytest.raises(AttemptFailed, match=r"criu died|criu in the guest failed \(137\)"):
        agent.go()


def test_agent_dies(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    agent_dies(host, agent, skeleton)


def test_agent_is_told_to_end(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    host.process.terminate()
    assert host.process.wait() == 0
    assert not alive(*skeleton.tasks, skeleton.criu_pid)
    assert not host.marks
    assert not host.restores


def start(host: AgentHost, agent: Agent, mode: str) -> None:
    """Say begin, and do not wait for the tree."""
    for message in (
        protocol.Files(("a",), (b"",)),
        protocol.Begin(host.criu_options(mode), 60000, 60000, 2, False),
    ):
        agent._send(message)
    wait_for(lambda: host.restores)


def test_agent_dies_before_the_hook(host: AgentHost, agent: Agent) -> None:
    # The stand-in sleeps long before its scripts; then there is nobody to ask: it gives up.
    start(host, agent, "ok")
    kill(host.process.pid)
    host.process.wait()
    time.sleep(1.5)
    assert not host.marks


@one_link
@pytest.mark.parametrize(
    ("mode", "limit", "code"),
    [("slow", {"timeout": 1.0}, Code.TIMEOUT), ("stalled", {"stall": 2.0}, Code.STALLED)],
)
def test_criu_takes_too_long(
    host: AgentHost, agent: Agent, *, mode: str, limit: dict[str, float], code: str
) -> None:
    with pytest.raises(AttemptFailed) as caught:
        agent.begin(IMAGES, criu_options=host.criu_options(mode), **limit)
    assert caught.value.code == code
    assert not host.marks
    assert not host.restores


def test_link_breaks_while_criu_builds(host: AgentHost, agent: Agent) -> None:
    start(host, agent, "stalled")
    agent.close()
    wait_for(lambda: not host.restores)
    assert not host.marks


def test_criu_fails(host: AgentHost, agent: Agent) -> None:
    with pytest.raises(CriuFailed, match=r"failed \(1\): .*Can't open /nowhere") as caught:
        agent.begin(IMAGES, criu_options=host.criu_options("fail"))
    assert "\x01" not in str(caught.value)
    assert "Restoring FAILED" in caught.value.hint
    assert not host.restores
    agent.abort()  # nothing is held: no harm


def test_criu_fails_without_a_word(host: AgentHost, agent: Agent) -> None:
    with pytest.raises(CriuFailed, match="status 3"):
        agent.begin(IMAGES, criu_options=host.criu_options("silent"))


def test_pid_is_taken(host: AgentHost, agent: Agent) -> None:
    with pytest.raises(PidTaken, match="4711"):
        agent.begin(IMAGES, criu_options=host.criu_options("pid-taken"))


def test_criu_crashes(host: AgentHost, agent: Agent) -> None:
    with pytest.raises(CriuFailed, match="status 137"):
        agent.begin(IMAGES, criu_options=host.criu_options("crash"))
    agent.ping()
    # The tasks that CRIU left behind are ours to kill, and nobody else's; and to reap, in time.
    children = Path(f"/proc/{host.process.pid}/task/{host.process.pid}/children")
    wait_for(lambda: not children.read_text())
    assert not host.marks


def test_tree_that_passed_no_hook_is_killed(host: AgentHost, agent: Agent) -> None:
    with pytest.raises(CriuFailed):
        agent.begin(IMAGES, criu_options=host.criu_options("no-hook"))
    assert not alive(*host.marks)


def test_criu_fails_after_go(host: AgentHost, agent: Agent) -> None:
    skeleton = agent.begin(IMAGES, criu_options=host.criu_options("fail-late"))
    with pytest.raises(CriuFailed):
        agent.go()
    # That they exit is all that the agent waits for.
    wait_for(lambda: not alive(*skeleton.tasks))


def test_criu_is_not_there(tmp_path: Path) -> None:
    with agent_host(tmp_path) as host, host.connect() as agent:
        (tmp_path / "criu").unlink()
        with fails(Code.START):
            begin(host, agent)
        wait_for(lambda: not host.restores)


def test_agent_whose_program_was_replaced(tmp_path: Path) -> None:
    # CRIU would start another program than the one that holds the other end.
    program, new = tmp_path / "ovr-agent", tmp_path / "new"
    shutil.copy(agent_program(), program)
    with agent_host(tmp_path, program) as host, host.connect() as agent:
        shutil.copy(program, new)
        new.rename(program)
        with pytest.raises(AttemptFailed) as caught:
            begin(host, agent)
        assert caught.value.code == Code.REPLACED
        wait_for(lambda: not host.restores)


def test_log_is_kept_on_request(host: AgentHost, agent: Agent) -> None:
    with pytest.raises(CriuFailed):
        agent.begin(IMAGES, criu_options=host.criu_options("fail"), keep_log=True)
    (directory,) = host.restores
    assert "Error" in (directory / "criu.log").read_text()
    assert not (directory / "images").exists()
