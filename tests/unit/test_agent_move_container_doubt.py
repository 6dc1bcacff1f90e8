"""A container's move in doubt, and its removal, with the real agent in its source."""

import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from ovr.errors import AgentUnreachable, AttemptFailed, TreeDamaged
from ovr.guest import dump_protocol, move_protocol, protocol
from ovr.guest.codes import Code
from ovr.lab.agent import LabAgent
from tests.unit.agent_host import AgentHost, alive, fails, kill, one_link, restarted, wait_for
from tests.unit.container_move_host import (
    IN_SCOPE,
    adopt,
    assert_in_doubt,
    assert_removed,
    assert_runs_on,
    to_packed,
    to_packing,
    to_prepared,
)
from tests.unit.dump_host import Tree, counting, open_gate
from tests.unit.engine_dump_host import choose_removal, install, removals
from tests.unit.move_host import (
    Groups,
    assert_as_before,
    assert_frozen,
    groups_for,
    in_doubt,
)


@pytest.fixture
def tree(host: AgentHost) -> Iterator[Tree]:
    with counting(host) as tree:
        install(host, tree)
        yield tree


@pytest.fixture
def groups(tree: Tree) -> Iterator[Groups]:
    with groups_for(tree, IN_SCOPE) as groups:
        yield groups


# ---- in doubt -----------------------------------------------------------------------------------


@one_link
def test_the_link_breaks_before_the_archive(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """CRIU still holds it: not even a later session ends it without an archive."""
    move = to_prepared(host, agent, tree, silence=1.0)
    agent.close()
    assert_in_doubt(host, move)
    assert_frozen(tree, groups)
    with host.connect() as other:
        other.adopt(move)
        with fails(Code.PROTOCOL):
            other.end_dump()
    assert_in_doubt(host, move)
    with host.connect() as other:
        other.adopt(move)
        other.archive(lambda piece: None)
        other.end_dump()
    assert_removed(host, tree, groups)


@one_link
def test_it_is_taken_back_before_the_archive(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    move = to_prepared(host, agent, tree)
    agent.close()
    assert_in_doubt(host, move)
    with host.connect() as other:
        other.adopt(move)
        other.abort()
    assert_runs_on(host, tree, groups)


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize("mode", ["wait-export", "wait-fail-export"])
@one_link
def test_the_link_breaks_while_podman_writes(
    host: AgentHost,
    agent: LabAgent,
    tree: Tree,
    groups: Groups,
    *,
    mode: str,
    finish: bool,
) -> None:
    """However podman ends, it is in doubt; and it cannot be adopted before."""
    move = to_packing(host, agent, tree, mode, kib=4000)
    with host.connect() as other:
        with fails(Code.BUSY):
            other.adopt(move)
        open_gate(host)
        adopt(other, move)
        assert_frozen(tree, groups, 0.2)
        decide(other, finish=finish)
    if finish:
        assert_removed(host, tree, groups)
    else:
        assert_runs_on(host, tree, groups)


@pytest.mark.parametrize("finish", [True, False])
@one_link
def test_the_link_breaks_after_the_archive(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups, finish: bool
) -> None:
    move = to_packed(host, agent, tree)
    agent.close()
    assert_in_doubt(host, move)
    assert_frozen(tree, groups, 0.2)
    with host.connect() as other:
        other.adopt(move)
        decide(other, finish=finish)
    if finish:
        assert_removed(host, tree, groups)
    else:
        assert_runs_on(host, tree, groups)


def decide(agent: LabAgent, *, finish: bool) -> None:
    if finish:
        assert agent.end_dump() == b""
    else:
        agent.abort()


@one_link
def test_the_host_is_silent(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    """It is told, for it may still wait for the answer."""
    move = to_prepared(host, agent, tree, "wait-export", silence=2.0)
    agent._send(move_protocol.Archive())
    deadline = time.monotonic() + 20
    while isinstance(message := agent._receive(deadline), dump_protocol.Saved):
        pass
    assert isinstance(message, protocol.Error)
    assert message.code == Code.SILENT
    open_gate(host)
    with host.connect() as other:
        adopt(other, move)
        assert_frozen(tree, groups, 0.2)
        other.abort()
    assert_runs_on(host, tree, groups)


# ---- the agent ends -----------------------------------------------------------------------------


def before_the_archive(host: AgentHost, agent: LabAgent, tree: Tree) -> str:
    return to_prepared(host, agent, tree)


def while_podman_writes(host: AgentHost, agent: LabAgent, tree: Tree) -> str:
    return to_packing(host, agent, tree)


def after_the_archive(host: AgentHost, agent: LabAgent, tree: Tree) -> str:
    return to_packed(host, agent, tree)


Stage = Callable[[AgentHost, LabAgent, Tree], str]
at_each = pytest.mark.parametrize(
    "stage", [before_the_archive, while_podman_writes, after_the_archive]
)


@at_each
@one_link
def test_the_next_agent_removes_it(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups, stage: Stage
) -> None:
    move = stage(host, agent, tree)
    kill(host.process.pid)
    host.process.wait()
    assert_frozen(tree, groups, 0.2)
    with restarted(host):
        assert_in_doubt(host, move)
        with host.connect() as other:
            other.adopt(move)
            assert other.end_dump() == b""
        assert_removed(host, tree, groups)


@at_each
@one_link
def test_the_next_agent_lets_it_run(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups, stage: Stage
) -> None:
    """Where CRIU has ended it is not known how."""
    move = stage(host, agent, tree)
    kill(host.process.pid)
    host.process.wait()
    with restarted(host):
        with host.connect() as other:
            other.adopt(move)
            if stage is before_the_archive:
                other.abort()
            else:
                with pytest.raises(TreeDamaged):
                    other.abort()
        assert_as_before(host, tree, groups)
    assert removals(host) == []


@pytest.mark.parametrize("stage", [while_podman_writes, after_the_archive])
@one_link
def test_the_agent_is_told_to_end(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups, stage: Stage
) -> None:
    """It lets podman end before, for a while."""
    move = stage(host, agent, tree)
    host.process.terminate()
    open_gate(host)
    assert host.process.wait(timeout=8) == 0
    assert_frozen(tree, groups, 0.2)
    with restarted(host):
        with host.connect() as other:
            other.adopt(move)
            other.end_dump()
        assert_removed(host, tree, groups)


@one_link
def test_cgroups_of_two_kinds(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    """The agent makes none such: it cannot be told who is to end the tree."""
    move = to_packed(host, agent, tree)
    kill(host.process.pid)
    host.process.wait()
    theirs = groups.base / f"ovr-move-{move}"
    theirs.mkdir()
    (theirs / "cgroup.freeze").write_text("1")
    sleeper = subprocess.Popen(["sleep", "600"])
    (theirs / "cgroup.procs").write_text(str(sleeper.pid))
    try:
        with restarted(host), host.connect() as other:
            with fails(Code.CGROUP):
                other.adopt(move)
            kill(sleeper.pid)
            wait_for(lambda: "populated 0" in (theirs / "cgroup.events").read_text())
            other.adopt(move)
            other.end_dump()
    finally:
        sleeper.kill()
        sleeper.wait()
    wait_for(lambda: not alive(*tree.pids))


# ---- removal ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "said"), [("fail", "storage is busy"), ("hang", "not end")])
@one_link
def test_podman_does_not_remove_it(
    host: AgentHost,
    agent: LabAgent,
    tree: Tree,
    groups: Groups,
    *,
    mode: str,
    said: str,
) -> None:
    """It is still prepared; the decision stands."""
    move = to_packed(host, agent, tree, stall=10.0)
    choose_removal(host, mode)
    with pytest.raises(AttemptFailed, match=said, check=lambda e: e.code == Code.ENGINE):
        agent.end_dump()
    assert in_doubt(agent) == ()
    assert_frozen(tree, groups, 0.2)
    with pytest.raises(AgentUnreachable):
        agent.abort()
    assert_in_doubt(host, move)
    assert_frozen(tree, groups, 0.2)
    choose_removal(host, "ok")
    with host.connect() as other:
        other.adopt(move)
        other.end_dump()
    assert_removed(host, tree, groups, 2)


@one_link
def test_podman_does_not_remove_it_for_the_next_agent(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    move = to_packed(host, agent, tree)
    kill(host.process.pid)
    host.process.wait()
    with restarted(host):
        choose_removal(host, "fail")
        with host.connect() as other:
            other.adopt(move)
            with fails(Code.ENGINE):
                other.end_dump()
        assert_in_doubt(host, move)
        with host.connect() as other:
            other.adopt(move)
            with pytest.raises(AgentUnreachable):
                other.abort()
        assert_in_doubt(host, move)
        choose_removal(host, "ok")
        with host.connect() as other:
            other.adopt(move)
            other.end_dump()
        assert_removed(host, tree, groups, 2)


@one_link
def test_podman_is_missing(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    to_packed(host, agent, tree)
    podman = host.directory / "podman"
    podman.rename(host.directory / "elsewhere")
    with fails(Code.ENGINE):
        agent.end_dump()
    assert_frozen(tree, groups, 0.2)
    (host.directory / "elsewhere").rename(podman)
    agent.end_dump()
    assert_removed(host, tree, groups)


@one_link
def test_the_link_breaks_while_podman_removes_it(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """It is in doubt until podman has succeeded, for it may fail."""
    move = to_packed(host, agent, tree)
    choose_removal(host, "wait")
    agent._send(protocol.Go())
    wait_for(lambda: removals(host))
    agent.close()
    assert_in_doubt(host, move)
    with host.connect() as other:
        with fails(Code.BUSY):
            other.adopt(move)
        choose_removal(host, "fail")
        adopt(other, move)
        choose_removal(host, "ok")
        other.end_dump()
    assert_removed(host, tree, groups, 2)


@one_link
def test_what_podman_leaves_is_ended(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    to_packed(host, agent, tree)
    choose_removal(host, "nothing")
    agent.end_dump()
    assert_removed(host, tree, groups)
