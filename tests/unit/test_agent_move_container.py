"""The commit of a container's move with the real agent, in its source.

CRIU has ended before the decision: the cgroups alone hold the tree. By Go podman ends it.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovr.errors import CriuFailed, TreeDamaged
from ovr.guest import move_protocol, protocol
from ovr.guest.client.requests import Portion
from ovr.guest.codes import Code
from ovr.guest.protocol import Touching
from ovr.lab.agent import LabAgent
from tests.unit.agent_host import AgentHost, alive, fails, one_link, wait_for
from tests.unit.container_move_host import (
    IN_SCOPE,
    OTHER,
    SCOPE,
    Names,
    adopt,
    assert_in_doubt,
    assert_removed,
    assert_runs_on,
    to_packed,
    to_prepared,
)
from tests.unit.dump_host import Tree, counting, dump, has_come_to, open_gate, options
from tests.unit.engine_dump_host import (
    ID,
    checkpoint_of,
    install,
    members,
    removals,
)
from tests.unit.engine_dump_host import dump as dump_container
from tests.unit.move_host import (
    Groups,
    assert_as_before,
    assert_ended,
    assert_frozen,
    groups_for,
    in_doubt,
    kill_hook,
    new_id,
)

PAGE = 4096


@pytest.fixture
def tree(host: AgentHost) -> Iterator[Tree]:
    with counting(host) as tree:
        install(host, tree)
        yield tree


@pytest.fixture
def groups(tree: Tree, request: pytest.FixtureRequest) -> Iterator[Groups]:
    names: Names = getattr(request, "param", IN_SCOPE)
    with groups_for(tree, names) as groups:
        yield groups


# ---- one session ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups",
    [
        (f"{SCOPE}/root", f"{SCOPE}/child"),
        (f"machine.slice/{SCOPE}", f"machine.slice/{SCOPE}/container"),
        (f"libpod_parent/libpod-{ID}/a", f"libpod_parent/libpod-{ID}/{OTHER}/b"),
    ],
    ids=["systemd", "itself", "cgroupfs"],
    indirect=True,
)
def test_go(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    move = to_prepared(host, agent, tree, silence=5.0, kib=3000)
    assert {path.name for path in groups.made()} == {f"ovr-move-{move}.podman"}
    archive: list[bytes] = []
    assert agent.archive(archive.append) == b""
    found = members(b"".join(archive))
    assert {"config.dump", "spec.dump", "large", "checkpoint/core-1.img"} <= {*found}
    # Nobody can restore from what lacks the memory, there or in the archive.
    assert "checkpoint/pages-1.img" not in found
    assert not checkpoint_of(host).exists()
    assert tree.tracers() == {0}
    assert_frozen(tree, groups, 0.2)
    assert removals(host) == []
    assert agent.end_dump() == b""
    assert_removed(host, tree, groups)


def test_its_memory_is_read_when_its_archive_was_made(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """What has gone to swap meanwhile. It is the memory of frozen tasks of this move alone."""
    to_packed(host, agent, tree)
    for pid in tree.pids:
        agent.touch([Portion(pid, Touching.READ, [(stack_of(pid), PAGE)])])
    with fails(Code.TASK):
        agent.touch([Portion(os.getpid(), Touching.READ, [(stack_of(os.getpid()), PAGE)])])
    assert_frozen(tree, groups, 0.2)
    agent.end_dump()
    assert_removed(host, tree, groups)


def stack_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    (stack,) = [line for line in lines if line.endswith("[stack]")]
    return int(stack.split()[0].split("-")[1], 16) - PAGE


def test_abort(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    for _ in range(2):
        to_packed(host, agent, tree)
        assert in_doubt(agent) == ()
        assert_frozen(tree, groups, 0.2)
        agent.abort()
        assert_runs_on(host, tree, groups)


def test_abort_before_the_archive(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    to_prepared(host, agent, tree, silence=1.0)
    assert_frozen(tree, groups)
    agent.abort()
    assert_runs_on(host, tree, groups)


class Broken(Exception):
    pass


def refuse(data: bytes) -> None:
    raise Broken


def test_abort_while_podman_writes(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """The host aborts when it gets the first piece; podman writes more than the pipes hold."""
    to_prepared(host, agent, tree, kib=8000)
    with pytest.raises(Broken):
        agent.archive(refuse)
    agent.abort()
    assert_runs_on(host, tree, groups)


@one_link
def test_abort_after_all_of_it_was_sent(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """What the agent has sent before is read, its answer as well."""
    to_prepared(host, agent, tree)
    with pytest.raises(Broken):
        agent.archive(refuse)
    wait_for(lambda: tree.tracers() == {0})
    wait_for(lambda: not checkpoint_of(host).exists())
    agent.abort()
    assert_runs_on(host, tree, groups)


@one_link
def test_abort_while_criu_lets_it_go(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    to_prepared(host, agent, tree, "wait-end")
    agent._send(move_protocol.Archive())
    wait_for(lambda: has_come_to(host, "end"))
    agent._send(protocol.Abort())
    wait_for(lambda: not groups.made())
    open_gate(host)
    agent.abort()
    assert_runs_on(host, tree, groups)


@one_link
def test_podman_hangs_after_an_abort(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """It is killed, and the container is none the worse."""
    to_prepared(host, agent, tree, "hang-export", stall=10.0)
    with pytest.raises(Broken):
        agent.archive(refuse)
    agent.abort()
    assert_runs_on(host, tree, groups)


# ---- CRIU or podman fail ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "said"),
    [("fail-export", "no space left on device"), ("wait-fail-export", "no space left on device"),
     ("fail-end", "at end")],
)  # fmt: skip
def test_the_archive_fails(
    host: AgentHost,
    agent: LabAgent,
    tree: Tree,
    groups: Groups,
    *,
    mode: str,
    said: str,
) -> None:
    """The guest's disk is full, or CRIU fails at the last moment: nothing has changed."""
    to_prepared(host, agent, tree, mode)
    open_gate(host)
    with pytest.raises(CriuFailed, match=said):
        agent.archive(lambda piece: None)
    assert_runs_on(host, tree, groups)


@one_link
def test_criu_is_killed_before_the_archive(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """The container's cgroup may be frozen for good."""
    to_prepared(host, agent, tree)
    for pid in tree.tracers():
        os.kill(pid, signal.SIGKILL)
    assert_frozen(tree, groups, 0.2)
    with pytest.raises(TreeDamaged):
        agent.archive(lambda piece: None)
    assert_as_before(host, tree, groups)


@one_link
def test_criu_is_killed_while_it_lets_go(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    to_prepared(host, agent, tree, "crash-end")
    with pytest.raises(TreeDamaged):
        agent.archive(lambda piece: None)
    assert_as_before(host, tree, groups)


@one_link
def test_the_hook_is_killed(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    """The second one waits as well, and is told the same."""
    to_prepared(host, agent, tree, silence=1.0)
    (criu,) = tree.tracers()
    kill_hook(host, criu)
    assert_frozen(tree, groups)
    agent.archive(lambda piece: None)
    agent.end_dump()
    assert_removed(host, tree, groups)


@one_link
def test_the_container_is_killed(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """By the guest's root, or for its memory: it is not said to run on."""
    to_packed(host, agent, tree)
    for pid in tree.pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(*tree.pids))
    with pytest.raises(TreeDamaged):
        agent.abort()
    assert_ended(host, tree, groups)


# ---- refused -----------------------------------------------------------------------------------


@one_link
def test_go_before_the_archive(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """It would let the tree run. Nothing is decided."""
    move = to_prepared(host, agent, tree, silence=1.0)
    with fails(Code.PROTOCOL):
        agent.end_dump()
    assert_in_doubt(host, move)
    assert_frozen(tree, groups)
    assert removals(host) == []
    with host.connect() as other:
        other.adopt(move)
        other.abort()
    assert_runs_on(host, tree, groups)


@pytest.mark.parametrize("decision", [protocol.Go(), move_protocol.Archive()])
@one_link
def test_out_of_order_while_podman_writes(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups, decision: protocol.Go
) -> None:
    move = to_prepared(host, agent, tree, "wait-export")
    agent._send(move_protocol.Archive())
    wait_for(lambda: has_come_to(host, "export"))
    agent._send(decision)
    assert_in_doubt(host, move)
    open_gate(host)
    with host.connect() as other:
        adopt(other, move)
        assert_frozen(tree, groups, 0.2)
        other.abort()
    assert_runs_on(host, tree, groups)


@one_link
def test_a_second_archive(host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups) -> None:
    move = to_packed(host, agent, tree)
    with fails(Code.PROTOCOL):
        agent.archive(lambda piece: None)
    assert_in_doubt(host, move)
    assert_frozen(tree, groups, 0.2)
    with host.connect() as other:
        other.adopt(move)
        other.end_dump()
    assert_removed(host, tree, groups)


@one_link
def test_no_archive_of_what_is_no_container(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    with fails(Code.IDLE):
        agent.archive(lambda piece: None)
    dump(agent, tree.process.pid, lambda name, data: None, criu_options=options(host))
    agent.prepare(move := new_id())
    assert {path.name for path in groups.made()} == {f"ovr-move-{move}"}
    with fails(Code.PROTOCOL):
        agent.archive(lambda piece: None)
    with host.connect() as other:
        adopt(other, move)
        other.abort()
    assert_as_before(host, tree, groups)


@one_link
def test_a_runtime_cannot_end_it(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    dump_container(host, agent, tree, engine="runc", leave_running=True)
    with fails(Code.PROTOCOL):
        agent.prepare(new_id())
    wait_for(lambda: not host.restores)
    assert_runs_on(host, tree, groups)


@pytest.mark.parametrize(
    "groups",
    [
        (f"{SCOPE}/root", f"{OTHER}/child"),
        (f"{OTHER}/root", f"{OTHER}/child"),
        (f"{SCOPE}/root", "child"),
        (f"{SCOPE}x/root", f"{SCOPE}x/child"),
        (f"libpod-payload-{ID}/root", f"libpod-payload-{ID}/child"),
        (f"libpod-conmon-{ID}.scope/root", f"libpod-conmon-{ID}.scope/child"),
        (f"libpod-{ID[1:]}.scope/root", f"libpod-{ID[1:]}.scope/child"),
    ],
    indirect=True,
)
@one_link
def test_not_all_of_one_container(
    host: AgentHost, agent: LabAgent, tree: Tree, groups: Groups
) -> None:
    """It is held as before."""
    dump_container(host, agent, tree, leave_running=True)
    with fails(Code.CGROUP):
        agent.prepare(new_id())
    assert not groups.made()
    assert tree.is_stopped()
    agent.abort()
    assert_runs_on(host, tree, groups)
