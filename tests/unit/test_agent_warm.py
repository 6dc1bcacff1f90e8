"""The pool of the real agent: made, used up, taken away. What CRIU does with it is seen in VMs."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovr.errors import AttemptFailed
from ovr.guest import build, protocol
from ovr.guest.client.agent import Agent
from ovr.guest.client.results import PoolInfo
from ovr.guest.codes import Code
from tests.unit.agent_host import IMAGES, AgentHost, agent_host, alive, fails, kill, wait_for

MIB = 1 << 20


@pytest.fixture
def agent(host: AgentHost) -> Iterator[Agent]:
    with host.connect(timeout=60) as agent:
        yield agent


def areas(pool: PoolInfo) -> list[tuple[int, str]]:
    """Resident KiB and flags of the areas of the pool in its process."""
    text = Path(f"/proc/{pool.pid}/smaps").read_text()
    found = []
    for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)[1:]:
        start, end = (int(word, 16) for word in part.split()[0].split("-"))
        if start < pool.address + pool.size and end > pool.address:
            resident = re.search(r"^Rss: +(\d+) kB", part, re.MULTILINE)
            flags = re.search(r"^VmFlags: (.*)$", part, re.MULTILINE)
            assert resident and flags
            found.append((int(resident[1]), flags[1]))
    return found


def test_a_pool(agent: Agent) -> None:
    assert agent.hello.warm == 0
    assert agent.pool().note == "none was made"
    pool = agent.warm(4 * MIB + 1)
    assert pool.size == 6 * MIB  # whole huge pages
    assert pool.address % (2 * MIB) == 0
    assert 0 <= pool.huge <= pool.size
    [(resident, flags)] = areas(pool)
    assert resident == 6 * 1024
    assert {"rd", "wr", "dc"} <= {*flags.split()}  # dc: no child gets it
    assert not {"hg", "nh"} & {*flags.split()}
    assert Path(f"/proc/{pool.pid}/oom_score_adj").read_text() == "1000\n"
    assert agent.pool() == pool
    left = agent.warm(0)
    assert (left.size, left.pid, left.note) == (0, 0, "it was discarded")
    assert not alive(pool.pid)


def test_a_pool_in_its_place(agent: Agent) -> None:
    for place in (0, 6 * MIB, 1022 * MIB):
        assert agent.warm(4 * MIB, place).address % (1 << 30) == place
    pool = agent.pool()
    for place in (1 << 30, 4096, 1, (1 << 64) - 2 * MIB):
        with fails(Code.PROTOCOL):
            agent.warm(4 * MIB, place)
    assert agent.pool() == pool


def test_another_session_finds_it(host: AgentHost, agent: Agent) -> None:
    pool = agent.warm(2 * MIB)
    with host.connect() as other:
        assert other.hello.warm == 2 * MIB
        assert other.hello.warm_at == pool.address
        assert other.pool() == pool
        again = other.warm(4 * MIB)
    assert again.size == 4 * MIB
    assert not alive(pool.pid)
    assert alive(again.pid)


def test_whoever_asked_may_leave(host: AgentHost) -> None:
    with host.connect() as agent:
        agent._send(protocol.Warm(64 * MIB))
    with host.connect() as other:
        wait_for(lambda: other.pool().size == 64 * MIB, 60)


def test_without_its_session(host: AgentHost) -> None:
    with host.connect(timeout=60) as agent:
        pool = agent.warm(2 * MIB, keep=False)
        with host.connect() as other:
            assert other.pool() == pool
    wait_for(lambda: not alive(pool.pid))
    with host.connect() as other:
        left = other.pool()
    assert (left.size, left.note) == (0, "its session ended")


def test_without_its_session_while_it_is_filled(host: AgentHost) -> None:
    with host.connect() as agent:
        agent._send(protocol.Warm(64 * MIB, keep=False))
    with host.connect(timeout=60) as other:
        wait_for(lambda: other.pool().note == "its session ended", 60)


def test_another_pool_does_not_end_with_that_session(host: AgentHost, agent: Agent) -> None:
    with host.connect(timeout=60) as other:
        other.warm(2 * MIB, keep=False)
        pool = agent.warm(2 * MIB)
    with host.connect() as other:
        assert other.pool() == pool


def test_more_than_there_is(agent: Agent) -> None:
    pool = agent.warm(2 * MIB)
    with fails(Code.NO_MEMORY):
        agent.warm(1 << 50)
    assert agent.pool() == pool


def test_killed(agent: Agent) -> None:
    pool = agent.warm(2 * MIB)
    kill(pool.pid)
    wait_for(lambda: agent.pool().size == 0)
    assert agent.pool().note == "it was killed; the guest needed the memory"
    assert agent.warm(2 * MIB).size == 2 * MIB


def test_a_program_that_is_no_criu(host: AgentHost, agent: Agent) -> None:
    """Linked statically, or gone: nothing loads the library."""
    (host.directory / "criu").unlink()
    with pytest.raises(AttemptFailed, match="no pool: No such file"):
        agent.warm(2 * MIB)
    (host.directory / "criu").symlink_to(build(flags=("-static",)))
    with pytest.raises(AttemptFailed, match="no pool: its process ended"):
        agent.warm(2 * MIB)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_the_agent(tmp_path: Path, number: signal.Signals) -> None:
    with agent_host(tmp_path) as host, host.connect() as agent:
        pool = agent.warm(2 * MIB)
        os.kill(host.process.pid, number)
        wait_for(lambda: not alive(pool.pid))
        host.process.wait()
        host.process.returncode = 0


def test_a_cold_restore_leaves_it_alone(host: AgentHost, agent: Agent) -> None:
    """Even when the agent looks for orphans of the tree that it kills."""
    pool = agent.warm(2 * MIB)
    skeleton = agent.begin(IMAGES, criu_options=host.criu_options())
    assert skeleton.warm == 0
    agent.abort()
    assert not alive(*skeleton.tasks)
    assert agent.pool() == pool


def test_a_restore_that_wants_one(host: AgentHost, agent: Agent) -> None:
    images = {**IMAGES, "pagemap-1.img": b"x", "pages-1.img": b"y"}
    wanted = ("pagemap-1.img", "pages-1.img")
    skeleton = agent.begin(images, criu_options=host.criu_options(), warm_images=wanted)
    assert (skeleton.warm, skeleton.note) == (0, "none was made")
    [restore] = host.restores
    assert not (restore / "images" / "parent").exists()
    agent.abort()


@pytest.mark.parametrize("names", [("../../escape",), ("absent.img",)])
def test_names_that_are_no_images(host: AgentHost, agent: Agent, names: tuple[str, ...]) -> None:
    """The pool is gone, and the restore is a cold one without a parent directory."""
    (host.directory / "run" / "escape").write_text("x")
    pool = agent.warm(2 * MIB)
    skeleton = agent.begin(IMAGES, criu_options=host.criu_options(), warm_images=names)
    assert (skeleton.warm, skeleton.note) == (0, "it did not accept the request")
    [restore] = host.restores
    assert not (restore / "images" / "parent").exists()
    agent.abort()
    assert not alive(pool.pid)


def test_an_invalid_table(host: AgentHost, agent: Agent) -> None:
    """CRIU that was started in advance ends, and says why; nothing is left of the restore."""
    agent.warm(2 * MIB)
    images = {**IMAGES, "pagemap-1.img": b"x", "ovr-warm.tab": b"nonsense" * 5}
    with pytest.raises(AttemptFailed, match="it could not accept the table"):
        agent.begin(images, criu_options=host.criu_options(), warm_images=("pagemap-1.img",))
    assert agent.pool().note == "it was used by a restore"
    wait_for(lambda: not host.restores)
