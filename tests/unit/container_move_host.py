"""A container whose move is prepared, for the agent of `agent_host` with its stand-ins."""

from ovr.errors import AttemptFailed
from ovr.guest import move_protocol
from ovr.guest.codes import Code
from ovr.lab.agent import LabAgent
from tests.unit.agent_host import AgentHost, wait_for
from tests.unit.dump_host import Tree, has_come_to, shut_gate
from tests.unit.engine_dump_host import ID, checkpoint_of, members, removals
from tests.unit.engine_dump_host import dump as dump_container
from tests.unit.move_host import (
    Groups,
    assert_as_before,
    assert_ended,
    in_doubt,
    new_id,
)

__all__ = [
    "IN_SCOPE", "OTHER", "REMOVAL", "SCOPE", "Names", "adopt", "assert_in_doubt", "assert_removed",
    "assert_runs_on", "to_packed", "to_packing", "to_prepared",
]  # fmt: skip

SCOPE = f"libpod-{ID}.scope"
OTHER = f"libpod-{'d' * 64}.scope"
REMOVAL = f"container rm --force --time 0 {ID}"

Names = tuple[str, str]
IN_SCOPE: Names = (f"{SCOPE}/root", f"{SCOPE}/child")
"""Paths of the cgroups of the tree's tasks."""


def to_prepared(
    host: AgentHost, agent: LabAgent, tree: Tree, mode: str = "ok", **more: float
) -> str:
    """Have the stand-ins dump the container, and the agent prepare it; return the move's id."""
    shut_gate(host)
    dump_container(host, agent, tree, mode=mode, leave_running=True, **more)  # type: ignore[arg-type]
    agent.prepare(move := new_id())
    return move


def to_packed(host: AgentHost, agent: LabAgent, tree: Tree, **more: float) -> str:
    """The same; then its archive is made."""
    move = to_prepared(host, agent, tree, **more)
    archive: list[bytes] = []
    assert agent.archive(archive.append) == b""
    assert "config.dump" in members(b"".join(archive))
    return move


def to_packing(
    host: AgentHost, agent: LabAgent, tree: Tree, mode: str = "wait-export", **more: float
) -> str:
    """The same; while it is made the link breaks."""
    move = to_prepared(host, agent, tree, mode, **more)
    agent._send(move_protocol.Archive())
    wait_for(lambda: has_come_to(host, "export"))
    agent.close()
    assert_in_doubt(host, move)
    return move


def assert_in_doubt(host: AgentHost, move: str) -> None:
    with host.connect() as other:
        wait_for(lambda: in_doubt(other) == (move,))


def adopt(agent: LabAgent, move: str) -> None:
    """Adopt it as soon as podman has ended."""

    def done() -> bool:
        try:
            agent.adopt(move)
        except AttemptFailed as error:
            assert error.code == Code.BUSY
            return False
        return True

    wait_for(done)


def assert_removed(host: AgentHost, tree: Tree, groups: Groups, times: int = 1) -> None:
    assert_ended(host, tree, groups)
    assert removals(host) == [REMOVAL] * times


def assert_runs_on(host: AgentHost, tree: Tree, groups: Groups) -> None:
    assert_as_before(host, tree, groups)
    assert removals(host) == []
    assert not checkpoint_of(host).exists()
