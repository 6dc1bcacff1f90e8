"""Cgroups of version 2 on this machine, for a tree whose move is prepared."""

import contextlib
import fcntl
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from ovr.lab.agent import LabAgent
from tests.unit.agent_host import AgentHost, alive, kill, wait_for
from tests.unit.dump_host import Tree, begin, criu_of, programs_of, shut_gate

__all__ = ["Groups", "assert_as_before", "groups_for", "new_id", "to_doubt", "to_prepared"]


_MOVES: Final[set[str]] = set()


@dataclass(frozen=True)
class Groups:
    """The cgroups of a tree: one for each of its tasks, below one of the test."""

    base: Path
    own: tuple[Path, Path]

    def made(self) -> list[Path]:
        """The cgroups that the agent has made."""
        return sorted(self.base.rglob("ovr-move-*"))


def new_id() -> str:
    """Return an id for a move."""
    move = secrets.token_hex(16)
    _MOVES.add(move)
    return move


def in_doubt(agent: LabAgent) -> tuple[str, ...]:
    """The moves in doubt, but for those of other tests on this machine."""
    return tuple(move for move in agent.doubts() if move in _MOVES)


@contextmanager
def _alone() -> Iterator[None]:
    # An agent that looks for moves in doubt removes a cgroup in which there is nothing yet.
    with Path(tempfile.gettempdir(), "ovr-test-cgroups.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _mount() -> Path:
    for path in map(Path, ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")):
        if (path / "cgroup.procs").exists() and os.access(path, os.W_OK):
            return path
    return pytest.skip("no cgroup of version 2 that can be written to; tests/vm has one")


@contextmanager
def groups_for(tree: Tree, names: tuple[str, str] = ("root", "child")) -> Iterator[Groups]:
    """Move each task of the tree into a cgroup of its own, with that path below one of the test."""
    with _alone():
        yield from _groups_for(tree, names)


def _groups_for(tree: Tree, names: tuple[str, str]) -> Iterator[Groups]:
    base = _mount() / f"ovr-test-{secrets.token_hex(4)}"
    own = base / names[0], base / names[1]
    try:
        for group, pid in zip(own, tree.pids, strict=True):
            group.mkdir(parents=True)
            (group / "cgroup.procs").write_text(str(pid))
        yield Groups(base, own)
    finally:
        # After a failed test it may still be held.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for pid in tree.tracers() - {0}:
                os.kill(pid, signal.SIGKILL)
        tree.close()
        wait_for(lambda: "populated 0" in (base / "cgroup.events").read_text())
        for path, _, _ in os.walk(base, topdown=False):
            Path(path).rmdir()


def group_of(pid: int) -> str:
    """Return the path of a process's cgroup."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line for line in lines if line.startswith("0::")).removeprefix("0::")


def in_own_groups(tree: Tree, groups: Groups) -> bool:
    """Whether each task is where it was at first."""
    return all(
        group_of(pid).endswith(f"/{group.parent.name}/{group.name}")
        for pid, group in zip(tree.pids, groups.own, strict=True)
    )


def to_prepared(host: AgentHost, agent: LabAgent, tree: Tree, *criu_options: str) -> str:
    """Have the stand-in dump the tree, and the agent prepare it; return the move's id."""
    shut_gate(host)
    options = (
        "--gate", str(host.directory), "--mode", "ok", "--kib", "4", *criu_options
    )  # fmt: skip
    begin(host, agent, tree, criu_options=options, silence=1.0)
    agent.prepare(move := new_id())
    return move


def to_doubt(host: AgentHost, agent: LabAgent, tree: Tree, *criu_options: str) -> str:
    """The same; then the link breaks."""
    move = to_prepared(host, agent, tree, *criu_options)
    agent.close()
    with host.connect() as other:
        wait_for(lambda: in_doubt(other) == (move,))
    return move


def kill_hook(host: AgentHost, criu: int) -> None:
    """Kill the hook that waits; CRIU runs the second one."""
    first = host.hook(criu)
    kill(first)

    def follows() -> bool:
        with contextlib.suppress(ValueError):  # between the two
            return host.hook(criu) != first
        return False

    wait_for(follows)


def assert_frozen(tree: Tree, groups: Groups, seconds: float = 1.5) -> None:
    """Nothing lets the tree run, for longer than its host may be silent."""
    before = tree.counts
    time.sleep(seconds)
    assert tree.counts == before
    assert len(groups.made()) == 2
    assert alive(*tree.pids)


def assert_as_before(host: AgentHost, tree: Tree, groups: Groups) -> None:
    """The tree runs in its own cgroups, and nothing is left of the move."""
    wait_for(lambda: tree.tracers() == {0})
    assert in_own_groups(tree, groups)
    assert tree.runs()
    assert not groups.made()
    wait_for(lambda: not programs_of(host))
    with host.connect() as other:
        assert not in_doubt(other)
    wait_for(lambda: not host.restores)


def assert_ended(host: AgentHost, tree: Tree, groups: Groups) -> None:
    """The tree has ended, and nothing is left of the move."""
    wait_for(lambda: not alive(*tree.pids))
    assert not groups.made()
    wait_for(lambda: not programs_of(host))
    with host.connect() as other:
        assert not in_doubt(other)
    wait_for(lambda: not host.restores)


def kill_all(host: AgentHost, *, criu: bool) -> None:
    """Kill the agent, and CRIU with it."""
    if criu:
        pid = criu_of(host)
        hook = host.hook(pid)
        for victim in (host.process.pid, hook, pid):
            os.kill(victim, signal.SIGKILL)
        wait_for(lambda: not alive(hook))
        with contextlib.suppress(ProcessLookupError):
            wait_for(lambda: not alive(pid))
    else:
        host.process.kill()
    host.process.wait()
