"""A dump with the real agent that comes to nothing, by every way to die: the tree runs on."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from ovr.errors import AgentUnreachable, AttemptFailed
from ovr.guest import dump_protocol, protocol
from ovr.guest.codes import Code
from ovr.guest.dump_protocol import Dumped
from ovr.lab.agent import LabAgent
from tests.unit.agent_host import AgentHost, alive, kill, one_link, restarted, wait_for
from tests.unit.dump_host import (
    STATS,
    Images,
    Tree,
    assert_unharmed,
    begin,
    counting,
    criu_of,
    dump,
    has_come_to,
    open_gate,
    open_gate_later,
    options,
    programs_of,
    shut_gate,
    start,
    stop,
)

LARGE = 8 << 10  # KiB of an image: more than the buffers of agent and link


@pytest.fixture
def tree(host: AgentHost) -> Iterator[Tree]:
    with counting(host) as tree:
        yield tree


class StopHere(Exception):
    """The host gives up."""


# ---- stages of a dump ----------------------------------------------------------------------


def to_start(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """CRIU has not looked at the tree yet."""
    start(host, agent, tree, options(host, "wait-start"))
    wait_for(lambda: has_come_to(host, "start"))


def to_tracking(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """CRIU waits before it stops the tree."""
    start(host, agent, tree, options(host))
    agent._outcome(dump_protocol.Starts)


def to_frozen(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """So it does, and the agent has stopped the tree."""
    to_tracking(host, agent, tree)
    agent.freeze()
    assert tree.is_stopped()


def to_seized(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """CRIU holds the tree, where the real one has code of its own in it."""
    stop(host, agent, tree, options(host, "wait-seized"))
    wait_for(lambda: has_come_to(host, "seized"))


def to_saving(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """Images are being sent; CRIU waits for its hook."""
    images = Images()

    def give_up(name: str, data: bytes) -> None:
        images.save(name, data)
        if len(images.get("pipes-data.img", b"")) > 1 << 20:
            raise StopHere

    with pytest.raises(StopHere):
        dump(agent, tree.process.pid, give_up, criu_options=options(host, "ok", LARGE), silence=60)
    assert images.open


def to_fetching(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """The host has all images, and a pages image is being sent."""
    begin(host, agent, tree, criu_options=options(host, "ok", LARGE), silence=60.0)

    def give_up(name: str, data: bytes) -> None:
        raise StopHere

    with pytest.raises(StopHere):
        agent.fetch("pages-1.img", give_up)


def to_held(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """The host has all images."""
    begin(host, agent, tree, silence=60.0)


Stage = Callable[[AgentHost, LabAgent, Tree], None]
AT_THE_HOOK = [to_saving, to_fetching, to_held]
STAGES = [to_start, to_tracking, to_frozen, to_seized, *AT_THE_HOOK]
at_each = pytest.mark.parametrize("to", STAGES)
at_the_hook = pytest.mark.parametrize("to", AT_THE_HOOK)


@at_each
def test_the_host_aborts(host: AgentHost, agent: LabAgent, tree: Tree, to: Stage) -> None:
    to(host, agent, tree)
    open_gate_later(host, 0.3)
    agent.abort()
    # When abort() returns it is over.
    assert tree.tracers() == {0}
    assert not host.restores
    assert_unharmed(host, tree)


@at_each
def test_the_link_breaks(host: AgentHost, agent: LabAgent, tree: Tree, to: Stage) -> None:
    to(host, agent, tree)
    agent.close()
    if to in AT_THE_HOOK:
        wait_for(lambda: tree.tracers() == {0})
    open_gate(host)
    assert_unharmed(host, tree)


@pytest.mark.parametrize("kib", [4, LARGE])
def test_the_host_is_silent(host: AgentHost, agent: LabAgent, tree: Tree, kib: int) -> None:
    """And reads nothing of what was sent, which may be all, or not."""
    stop(host, agent, tree, options(host, "ok", kib), 0.5)
    wait_for(lambda: has_come_to(host, "seized"))
    # It runs again without a word of ours.
    wait_for(lambda: tree.tracers() == {0} and tree.runs() and not programs_of(host))
    assert reported(agent).code == Code.SILENT
    assert_unharmed(host, tree)


@at_each
def test_the_agent_is_told_to_end(host: AgentHost, agent: LabAgent, tree: Tree, to: Stage) -> None:
    """It waits for CRIU, and tells the host."""
    to(host, agent, tree)
    host.process.terminate()
    open_gate_later(host, 0.5)
    if to not in (to_saving, to_fetching):  # there is no room for it in a full buffer
        assert reported(agent).code == Code.AGENT
    # Not only when it stops to wait for CRIU, in ten seconds
    assert host.process.wait(timeout=8) == 0
    assert tree.tracers() == {0}
    assert tree.runs()
    assert not host.restores
    assert not programs_of(host)


@at_each
def test_the_agent_is_killed(host: AgentHost, agent: LabAgent, tree: Tree, to: Stage) -> None:
    to(host, agent, tree)
    host.process.kill()
    host.process.wait()
    open_gate(host)
    with pytest.raises(AgentUnreachable):
        agent.end_dump()
    wait_for(lambda: tree.tracers() == {0} and not programs_of(host))
    assert tree.runs()
    with restarted(host):
        assert_unharmed(host, tree)


@at_each
def test_agent_and_hook_are_killed_at_once(
    host: AgentHost, agent: LabAgent, tree: Tree, to: Stage
) -> None:
    """As by ``pkill -9 ovr-agent``."""
    to(host, agent, tree)
    hooks = [host.hook(criu_of(host))] if to in AT_THE_HOOK else []
    for pid in (*hooks, host.process.pid):
        os.kill(pid, signal.SIGKILL)
    host.process.wait()
    open_gate(host)
    wait_for(lambda: tree.tracers() == {0} and not programs_of(host))
    assert tree.runs()
    with restarted(host):
        assert_unharmed(host, tree)


@one_link
@at_the_hook
def test_the_hook_is_killed(host: AgentHost, agent: LabAgent, tree: Tree, to: Stage) -> None:
    """CRIU takes that for success, and would end the tree: the second hook keeps it from that."""
    for _ in range(3):
        shut_gate(host)
        to(host, agent, tree)
        kill(host.hook(criu_of(host)))
        wait_for(lambda: tree.tracers() == {0})
        assert tree.runs()
        error = reported(agent)
        assert error.code == Code.HOOK
        assert "runs on" in error.hint
    assert_unharmed(host, tree)


@one_link
def test_the_hook_is_killed_as_the_host_says_go(
    host: AgentHost, agent: LabAgent, tree: Tree
) -> None:
    """Whoever is heard first: the tree has ended and the host knows, or it runs."""
    begin(host, agent, tree)
    os.kill(host.hook(criu_of(host)), signal.SIGKILL)  # and do not wait
    try:
        agent.end_dump()
    except AttemptFailed:
        assert_unharmed(host, tree)
    else:
        wait_for(lambda: not alive(*tree.pids))


@one_link
def test_the_hook_is_stopped_while_go_is_said(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """And killed with the word unread: it was said."""
    begin(host, agent, tree)
    hook = host.hook(criu_of(host))
    os.kill(hook, signal.SIGSTOP)
    agent._send(protocol.Go())
    with host.connect() as other:
        other.ping()
    time.sleep(0.2)
    os.kill(hook, signal.SIGKILL)
    assert agent._outcome(Dumped, time.monotonic() + 10).stats == STATS
    wait_for(lambda: not alive(*tree.pids))


@one_link
@pytest.mark.parametrize("to", [to_start, to_tracking, to_frozen])
def test_criu_is_killed_before_it_stops_the_tree(
    host: AgentHost, agent: LabAgent, tree: Tree, to: Stage
) -> None:
    """It has not touched the tree."""
    to(host, agent, tree)
    os.kill(criu_of(host), signal.SIGKILL)
    error = reported(agent)
    assert "criu in the guest ended with status 137" in str(error)
    assert_unharmed(host, tree)


@one_link
def test_criu_is_killed_between_its_hooks(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """The tree may be damaged, and the host is told so."""
    to_seized(host, agent, tree)
    os.kill(criu_of(host), signal.SIGKILL)
    error = reported(agent)
    assert "may not run as before: criu in the guest was killed (137)" in str(error)
    assert error.code == Code.CRIU
    assert "see whether the tree still works" in error.hint
    assert_unharmed(host, tree)


@one_link
def test_criu_is_killed_after_an_abort(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    to_seized(host, agent, tree)
    agent._send(protocol.Abort())
    agent.ping()
    os.kill(criu_of(host), signal.SIGKILL)
    error = reported(agent)
    assert "aborted by the host; criu was killed" in str(error)
    assert error.code == Code.CRIU
    assert "see whether the tree still works" in error.hint
    assert_unharmed(host, tree)


@one_link
@at_the_hook
def test_criu_is_killed_at_its_hook(
    host: AgentHost, agent: LabAgent, tree: Tree, to: Stage
) -> None:
    """Nothing of it is in the tree."""
    to(host, agent, tree)
    os.kill(criu_of(host), signal.SIGKILL)
    error = reported(agent)
    assert "criu died while it held the tree" in str(error)
    assert error.code == Code.CRIU
    assert "runs on" in error.hint
    assert_unharmed(host, tree)


@one_link
@pytest.mark.parametrize("option", ["--tcp-established", "--freeze-cgroup=x"])
def test_criu_is_killed_with_something_locked(
    host: AgentHost, agent: LabAgent, tree: Tree, option: str
) -> None:
    begin(host, agent, tree, criu_options=options(host, "ok", 4, option))
    os.kill(criu_of(host), signal.SIGKILL)
    with pytest.raises(AttemptFailed, match="may not run as before") as caught:
        agent.end_dump()
    assert "its network" in caught.value.hint
    assert_unharmed(host, tree)


@one_link
def test_criu_is_killed_after_go(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    begin(host, agent, tree, criu_options=options(host, "crash-end"))
    with pytest.raises(AttemptFailed, match="may not run as before"):
        agent.end_dump()
    assert_unharmed(host, tree)


@one_link
def test_criu_hangs_after_an_abort(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """It is not killed: the host is told, and others are told to wait until it ends."""
    with pytest.raises(AttemptFailed) as caught:
        begin(host, agent, tree, criu_options=options(host, "wait-seized"), timeout=1.0, stall=0.5)
    assert caught.value.code == Code.HANGS
    assert f"criu ({criu_of(host)}) does not end" in str(caught.value)
    assert "until CRIU ends" in caught.value.hint
    with host.connect() as other:
        for session in (other, agent):
            with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.BUSY):
                begin(host, session, tree)
    open_gate(host)
    assert_unharmed(host, tree)


@one_link
@pytest.mark.parametrize(
    ("limit", "code"), [({"timeout": 0.5}, Code.TIMEOUT), ({"stall": 3.0}, Code.STALLED)]
)
def test_criu_takes_too_long(
    host: AgentHost, agent: LabAgent, tree: Tree, limit: dict[str, float], code: Code
) -> None:
    """It ends after the limit, and less than `stall` after that: it does not hang."""
    seconds = str(sum(limit.values()) + 1.5)
    sleeps = options(host, "sleep-seized", 4, "--seconds", seconds)
    with pytest.raises(AttemptFailed) as caught:
        begin(host, agent, tree, criu_options=sleeps, **limit)
    assert caught.value.code == code
    assert "runs on" in caught.value.hint
    assert_unharmed(host, tree)


def reported(agent: LabAgent) -> AttemptFailed:
    """Return the error that the agent reports after all else that it sent."""
    deadline = time.monotonic() + 10
    ends = protocol.Aborted | protocol.Failed
    while not isinstance(message := agent._receive(deadline), ends):
        pass
    with pytest.raises(AttemptFailed) as caught:
        agent._checked(message, protocol.Stopped)
    return caught.value
