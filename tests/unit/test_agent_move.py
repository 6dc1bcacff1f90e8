"""The commit of a move with the real agent, in its source: prepared, in doubt, decided.

At most one of two trees may ever run: here this one runs again by `abort` alone.
"""

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from ovr.errors import AgentUnreachable, AttemptFailed
from ovr.guest.codes import Code
from ovr.lab.agent import LabAgent
from tests.unit.agent_host import (
    AgentHost,
    alive,
    fails,
    kill,
    one_link,
    restarted,
    state_of,
    wait_for,
)
from tests.unit.dump_host import STATS, Tree, begin, counting, criu_of, dump, options
from tests.unit.move_host import (
    Groups,
    assert_as_before,
    assert_ended,
    assert_frozen,
    groups_for,
    in_doubt,
    kill_all,
    kill_hook,
    new_id,
    to_doubt,
    to_prepared,
)

LOCKED = "--tcp-established"


@pytest.fixture
def tree(host: AgentHost) -> Iterator[Tree]:
    with counting(host) as tree:
        yield tree


@pytest.fixture
def groups(tree: Tree) -> Iterator[Groups]:
    with groups_for(tree) as groups:
        yield groups


# ---- one session ------------------------------------------------------------------------------


def test_go(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    to_prepared(host, agent, tree)
    assert_frozen(tree, groups)
    assert agent.end_dump() == STATS
    assert_ended(host, tree, groups)


def test_abort(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    for _ in range(2):
        to_prepared(host, agent, tree)
        assert in_doubt(agent) == ()  # it has a session
        assert_frozen(tree, groups)
        agent.abort()
        assert_as_before(host, tree, groups)


@one_link
def test_nothing_but_a_decision(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """A request out of order ends the session, and decides nothing."""
    move = to_prepared(host, agent, tree)
    with pytest.raises(AttemptFailed):
        agent.prepare(move)
    with host.connect() as other:
        wait_for(lambda: in_doubt(other) == (move,))
        with fails(Code.BUSY):
            begin(host, other, tree)
    assert_frozen(tree, groups)
    with host.connect() as other:
        other.adopt(move)
        other.abort()
    assert_as_before(host, tree, groups)


# ---- in doubt -----------------------------------------------------------------------------------


def link_breaks(host: AgentHost, agent: LabAgent, tree: Tree) -> str:
    return to_doubt(host, agent, tree)


def hook_dies(host: AgentHost, agent: LabAgent, tree: Tree) -> str:
    """A second hook follows, and waits as well."""
    move = to_prepared(host, agent, tree)
    kill_hook(host, criu_of(host))
    agent.ping()
    agent.close()
    return move


Doubt = Callable[[AgentHost, LabAgent, Tree], str]
at_each = pytest.mark.parametrize("doubt", [link_breaks, hook_dies])


@at_each
def test_adopt_and_go(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups, doubt: Doubt
) -> None:
    move = doubt(host, agent, tree)
    assert_frozen(tree, groups)
    with host.connect() as other:
        other.adopt(move)
        assert in_doubt(other) == ()
        assert other.end_dump() == STATS
    assert_ended(host, tree, groups)


@at_each
def test_adopt_and_abort(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups, doubt: Doubt
) -> None:
    move = doubt(host, agent, tree)
    with host.connect() as other:
        other.adopt(move)
        assert_frozen(tree, groups)
        other.abort()
    assert_as_before(host, tree, groups)


@one_link
def test_who_may_adopt(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    move = to_prepared(host, agent, tree)
    with host.connect() as other:
        with fails(Code.BUSY):
            other.adopt(move)
        agent.close()
        wait_for(lambda: in_doubt(other) == (move,))
        with fails(Code.BUSY):
            other.adopt(new_id())
        other.adopt(move)
    with host.connect() as third:
        wait_for(lambda: in_doubt(third) == (move,))
        third.adopt(move)
        third.abort()
    assert_as_before(host, tree, groups)


@one_link
def test_a_move_that_is_not_in_doubt(host: AgentHost, agent: LabAgent) -> None:
    with fails(Code.DOUBT):
        agent.adopt(new_id())
    assert in_doubt(agent) == ()
    agent.ping()


# ---- CRIU or the agent die -----------------------------------------------------------------------


@one_link
def test_criu_is_killed(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    """The cgroups alone hold the tree."""
    for ends in (False, True):
        to_prepared(host, agent, tree)
        os.kill(criu_of(host), signal.SIGKILL)
        assert_frozen(tree, groups)
        assert tree.tracers() == {0}
        if ends:
            assert agent.end_dump() == b""
            assert_ended(host, tree, groups)
        else:
            agent.abort()
            assert_as_before(host, tree, groups)


@one_link
def test_criu_is_killed_with_something_locked(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    to_prepared(host, agent, tree, LOCKED)
    os.kill(criu_of(host), signal.SIGKILL)
    with pytest.raises(AttemptFailed, match="may not run as before"):
        agent.abort()
    assert_as_before(host, tree, groups)


@one_link
def test_all_hooks_are_killed(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    """CRIU takes that for success, and ends the tree: at least it is not said to run on."""
    to_prepared(host, agent, tree)
    kill_hook(host, criu_of(host))
    kill(host.hook(criu_of(host)))
    wait_for(lambda: not alive(*tree.pids))
    with pytest.raises(AttemptFailed, match="may not run as before"):
        agent.abort()
    assert_ended(host, tree, groups)


@one_link
def test_the_tree_is_killed(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    """By the guest's root, or for its memory; the move is still to be decided."""
    move = to_doubt(host, agent, tree)
    for pid in tree.pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(*tree.pids))
    with host.connect() as other:
        assert in_doubt(other) == (move,)
        other.adopt(move)
        other.end_dump()
    assert_ended(host, tree, groups)


@pytest.mark.parametrize("how", ["kill", "kill criu, too", "terminate"])
@one_link
def test_the_next_agent_ends_it(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups, how: str
) -> None:
    move = to_prepared(host, agent, tree)
    agent_ends(host, how)
    assert_frozen(tree, groups)
    with restarted(host):
        with host.connect() as other:
            assert in_doubt(other) == (move,)
            other.adopt(move)
            assert in_doubt(other) == ()
        assert_frozen(tree, groups)
        with host.connect() as other:
            wait_for(lambda: in_doubt(other) == (move,))
            other.adopt(move)
            assert other.end_dump() == b""
        assert_ended(host, tree, groups)


@pytest.mark.parametrize("how", ["kill", "terminate"])
@one_link
def test_the_next_agent_lets_it_run(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups, how: str
) -> None:
    """By the CRIU of the last one, which has put back what it had locked."""
    move = to_prepared(host, agent, tree, LOCKED)
    agent_ends(host, how)
    assert_frozen(tree, groups)
    assert tree.tracers() != {0}
    with restarted(host):
        with host.connect() as other:
            other.adopt(move)
            other.abort()
            assert tree.tracers() == {0}
        assert_as_before(host, tree, groups)


@one_link
def test_the_next_agent_lets_it_run_without_criu(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """Whether something is still locked cannot be known."""
    move = to_prepared(host, agent, tree)
    agent_ends(host, "kill criu, too")
    assert_frozen(tree, groups)
    with restarted(host):
        with host.connect() as other:
            other.adopt(move)
            with pytest.raises(AttemptFailed, match="may not run as before"):
                other.abort()
        assert_as_before(host, tree, groups)


@one_link
def test_the_next_agent_sleeps_without_criu(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """CRIU's end is no event that goes on until the move is decided."""
    move = to_prepared(host, agent, tree)
    criu = criu_of(host)
    agent_ends(host, "kill")
    with restarted(host):
        with host.connect() as other:
            other.adopt(move)
            os.kill(criu, signal.SIGKILL)
            wait_for(lambda: tree.tracers() == {0})
            wait_for(lambda: sleeps(host.process.pid))
            assert other.end_dump() == b""
        assert_ended(host, tree, groups)


def sleeps(pid: int) -> bool:
    """Whether a process sleeps, each time that it is looked at."""
    return all(state_of(pid) == "S" for _ in range(1000))


def agent_ends(host: AgentHost, how: str) -> None:
    if how == "terminate":
        host.process.terminate()
        assert host.process.wait(timeout=8) == 0
    else:
        kill_all(host, criu=how != "kill")


# ---- refused -----------------------------------------------------------------------------------


@one_link
def test_a_cgroup_of_that_name(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """It is not the agent's. The dump is held as before, and so is what the agent had moved."""
    begin(host, agent, tree, silence=60.0)
    move = new_id()
    theirs = groups.own[1] / f"ovr-move-{move}"
    theirs.mkdir()
    with fails(Code.CGROUP):
        agent.prepare(move)
    assert groups.made() == [theirs]
    assert tree.is_stopped()
    agent.prepare(other := new_id())
    assert len(groups.made()) == 3
    agent.abort()
    assert groups.made() == [theirs]
    theirs.rmdir()
    assert other != move
    assert_as_before(host, tree, groups)


@one_link
def test_a_threaded_cgroup(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    threads = groups.own[0] / "threads"
    threads.mkdir()
    (threads / "cgroup.type").write_text("threaded")
    begin(host, agent, tree, silence=60.0)
    with fails(Code.CGROUP):
        agent.prepare(new_id())
    assert not groups.made()
    agent.abort()
    assert_as_before(host, tree, groups)


@one_link
def test_no_room_for_a_cgroup(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    """As the owner of a cgroup may have it; the first one was made, and is removed."""
    (groups.own[1] / "cgroup.max.descendants").write_text("0")
    begin(host, agent, tree, silence=60.0)
    with fails(Code.CGROUP):
        agent.prepare(new_id())
    assert not groups.made()
    agent.abort()
    assert_as_before(host, tree, groups)


@one_link
@pytest.mark.parametrize("move", ["", "x" * 32, "A" * 32, "0" * 31, "0" * 33, "../" + "0" * 29])
@pytest.mark.parametrize("request_", ["prepare", "adopt", "moved"])
def test_an_invalid_id(host: AgentHost, agent: LabAgent, move: str, request_: str) -> None:
    with fails(Code.PROTOCOL):
        getattr(agent, request_)(move)


@one_link
def test_nothing_to_prepare(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    with fails(Code.IDLE):
        agent.prepare(new_id())
    dump(
        agent, tree.process.pid, lambda name, data: None, criu_options=options(host),
        leave_running=True,
    )  # fmt: skip
    with fails(Code.PROTOCOL):
        agent.prepare(new_id())
    wait_for(lambda: tree.tracers() == {0})


# ---- the agent dies at the decision ------------------------------------------------------------


@one_link
def test_the_agent_dies_while_it_is_asked(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    move = to_prepared(host, agent, tree)
    kill(host.process.pid)
    with pytest.raises(AgentUnreachable):
        agent.end_dump()
    host.process.wait()
    assert_frozen(tree, groups)
    with restarted(host):
        with host.connect() as other:
            other.adopt(move)
            other.abort()
        assert_as_before(host, tree, groups)
