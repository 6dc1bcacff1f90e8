"""A dump by a container engine, with the real agent: CRIU is another program's child."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovr.errors import AgentUnreachable, ArchiveFailed, AttemptFailed, CriuFailed
from ovr.guest.codes import Code
from ovr.lab.agent import LabAgent
from tests.unit.agent_host import AgentHost, alive, children, kill, wait_for
from tests.unit.dump_host import (
    PARENT,
    STATS,
    Images,
    Tree,
    counting,
    expected,
    has_come_to,
    open_gate,
    options,
)
from tests.unit.engine_dump_host import (
    ID,
    assert_unharmed,
    checkpoint_of,
    dump,
    install,
    members,
)

DESCRIPTORS = {"descriptors.json": b"[]"}


@pytest.fixture
def tree(host: AgentHost) -> Iterator[Tree]:
    with counting(host) as tree:
        install(host, tree)
        yield tree


@pytest.mark.parametrize("engine", ["podman", "runc"])
def test_a_container_is_found(agent: LabAgent, tree: Tree, engine: str) -> None:
    found = agent.find(engine, "web")
    assert found.status == 0
    assert str(tree.process.pid) in found.data.decode()
    missing = agent.find(engine, "other")
    assert (missing.status, missing.data) == (125, b"")
    assert missing.text == "Error: no such container other"


@pytest.mark.parametrize("name", ["", "-web", "--all"])
def test_names_that_are_options(host: AgentHost, agent: LabAgent, tree: Tree, name: str) -> None:
    for ask in (
        lambda: agent.find("podman", name),
        lambda: dump(host, agent, tree, name=name),
    ):
        with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.ENGINE):
            ask()
    assert_unharmed(host, tree)


def test_no_other_program_is_an_engine(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.ENGINE):
        agent.find("sh", "web")
    with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.ENGINE):
        dump(host, agent, tree, engine="sh")
    assert_unharmed(host, tree)


def test_podman_ends_it_and_its_archive_comes(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    images, archive = Images(), list[bytes]()
    held = dump(host, agent, tree, images, kib=3000)
    assert images == expected(3000) | DESCRIPTORS
    assert held.root_pid == tree.process.pid
    assert sorted(held.tasks) == sorted(tree.pids)
    assert tree.tracers() == {held.criu_pid}
    assert tree.is_stopped()
    assert agent.end_dump(archive.append) == b""
    wait_for(lambda: not alive(*tree.pids))
    wait_for(lambda: not host.restores)
    found = members(b"".join(archive))
    assert {"config.dump", "spec.dump", "large", "checkpoint/core-1.img"} <= {*found}
    # Nobody can restore from what lacks the memory, there or in the archive.
    assert "checkpoint/pages-1.img" not in found
    assert "checkpoint/parent" not in found
    assert not checkpoint_of(host).exists()


def test_a_runtime_ends_it(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    images = Images()
    dump(host, agent, tree, images, engine="runc")
    assert images == expected() | DESCRIPTORS
    assert agent.end_dump() == STATS
    wait_for(lambda: not alive(*tree.pids))
    wait_for(lambda: not host.restores)


def test_it_runs_on_if_it_is_to(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    archive = list[bytes]()
    dump(host, agent, tree, leave_running=True)
    agent.end_dump(archive.append)
    assert "config.dump" in members(b"".join(archive))
    assert_unharmed(host, tree)


@pytest.mark.parametrize("engine", ["podman", "runc"])
def test_abort_and_again(host: AgentHost, agent: LabAgent, tree: Tree, engine: str) -> None:
    for _ in range(2):
        dump(host, agent, tree, engine=engine)
        agent.abort()
        # When abort() returns it is over, for the engine too.
        assert tree.tracers() == {0}
        assert not host.restores
        assert not checkpoint_of(host).exists()
    assert_unharmed(host, tree)


def test_old_images_in_podmans_directory(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """As a checkpoint that failed leaves them, with a link to another parent."""
    old = checkpoint_of(host)
    old.mkdir(parents=True)
    (old / "core-77.img").write_bytes(b"old")
    (old / "parent").symlink_to("/nowhere")
    images = Images()
    dump(host, agent, tree, images)
    assert images == expected() | DESCRIPTORS
    agent.abort()
    assert_unharmed(host, tree)


def test_link_breaks(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    dump(host, agent, tree)
    agent.close()
    assert_unharmed(host, tree)


def test_link_breaks_before_criu_runs_the_hook(
    host: AgentHost, agent: LabAgent, tree: Tree
) -> None:
    with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.TIMEOUT):
        agent.start_dump(
            tree.process.pid, PARENT,
            criu_options=options(host, "sleep-start"),
            engine="podman", name="web", timeout=2.0,
        )  # fmt: skip
    assert has_come_to(host, "start")
    assert_unharmed(host, tree)


def test_host_is_silent(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    dump(host, agent, tree, silence=0.4)
    wait_for(lambda: tree.tracers() == {0})
    with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.SILENT):
        agent.end_dump(list[bytes]().append)
    assert_unharmed(host, tree)


def test_hook_dies(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    held = dump(host, agent, tree)
    kill(host.hook(held.criu_pid))
    wait_for(lambda: tree.tracers() == {0})
    with pytest.raises(AttemptFailed, match="the hook died"):
        agent.end_dump(list[bytes]().append)
    assert_unharmed(host, tree)


def engine_of(host: AgentHost) -> int:
    (engine,) = children(host.process.pid, lambda words: "checkpoint" in words)
    return engine


def test_agent_dies(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    dump(host, agent, tree)
    engine = engine_of(host)
    kill(host.process.pid)
    wait_for(lambda: not alive(engine))
    wait_for(lambda: tree.tracers() == {0})
    assert tree.runs()
    with pytest.raises(AgentUnreachable):
        agent.end_dump(list[bytes]().append)
    host.process.wait()


def test_criu_is_killed_while_it_holds_the_tree(
    host: AgentHost, agent: LabAgent, tree: Tree
) -> None:
    held = dump(host, agent, tree)
    kill(held.criu_pid)
    wait_for(lambda: tree.tracers() == {0})
    # Its cgroup may be frozen for good.
    with pytest.raises(AttemptFailed, match="may not run as before"):
        agent.end_dump(list[bytes]().append)
    assert_unharmed(host, tree)


def test_engine_is_killed_while_its_criu_holds_the_tree(
    host: AgentHost, agent: LabAgent, tree: Tree
) -> None:
    dump(host, agent, tree)
    kill(engine_of(host))
    wait_for(lambda: tree.tracers() == {0})
    with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.ENGINE):
        agent.end_dump(list[bytes]().append)
    assert_unharmed(host, tree)


def test_engine_is_killed_while_its_criu_ends_the_tree(
    host: AgentHost, agent: LabAgent, tree: Tree
) -> None:
    """Until CRIU has ended it is not known whether the tree runs on."""
    dump(host, agent, tree, mode="wait-end")

    def kill_engine() -> None:
        wait_for(lambda: has_come_to(host, "end"))
        kill(engine_of(host))
        time.sleep(0.5)  # the agent must not take the tree for one that runs on
        open_gate(host)

    killer = threading.Thread(target=kill_engine)
    killer.start()
    with pytest.raises(ArchiveFailed):
        agent.end_dump(list[bytes]().append)
    killer.join()
    wait_for(lambda: not alive(*tree.pids))
    wait_for(lambda: not host.restores)


@pytest.mark.parametrize(
    ("engine", "mode"), [("podman", "no-hook"), ("runc", "no-hook"), ("runc", "no-wrapper")]
)
def test_without_the_hook_nothing_is_dumped(
    host: AgentHost, agent: LabAgent, tree: Tree, engine: str, mode: str
) -> None:
    """CRIU takes the parent for one that has the memory, but finds no inventory there."""
    with pytest.raises(CriuFailed, match=f"{engine} in the guest failed"):
        dump(host, agent, tree, engine=engine, mode=mode)
    if mode == "no-wrapper":
        assert not checkpoint_of(host).exists()
    assert tree.runs()


@pytest.mark.parametrize("stage", ["start", "seized"])
def test_criu_fails(host: AgentHost, agent: LabAgent, tree: Tree, stage: str) -> None:
    with pytest.raises(CriuFailed, match="podman in the guest failed"):
        dump(host, agent, tree, mode=f"fail-{stage}")
    assert tree.runs()


def test_criu_fails_at_the_last_moment(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    dump(host, agent, tree, mode="fail-end")
    with pytest.raises(CriuFailed, match="at end"):
        agent.end_dump(list[bytes]().append)
    assert_unharmed(host, tree)


@pytest.mark.parametrize("engine", ["podman", "runc"])
def test_engine_fails_after_the_end(
    host: AgentHost, agent: LabAgent, tree: Tree, engine: str
) -> None:
    dump(host, agent, tree, engine=engine, mode="fail-export")
    with pytest.raises(ArchiveFailed, match="no space left on device"):
        agent.end_dump(list[bytes]().append)
    wait_for(lambda: not alive(*tree.pids))
    wait_for(lambda: not host.restores)


def test_engine_fails_and_it_runs_on(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    dump(host, agent, tree, mode="fail-export", leave_running=True)
    with pytest.raises(CriuFailed, match="no space left on device"):
        agent.end_dump(list[bytes]().append)
    assert_unharmed(host, tree)


def test_nobody_takes_the_archive(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """The link breaks: podman ends all the same."""

    class Broken(Exception):
        pass

    def refuse(data: bytes) -> None:
        raise Broken

    dump(host, agent, tree, kib=4000)
    with pytest.raises(Broken):
        agent.end_dump(refuse)
    agent.close()
    wait_for(lambda: not host.restores)
    assert not alive(*tree.pids)


def test_another_root_than_the_one_wanted(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.TREE):
        dump(host, agent, tree, pid=os.getpid())
    assert_unharmed(host, tree)


def test_agent_dies_while_the_archive_is_written(
    host: AgentHost, agent: LabAgent, tree: Tree
) -> None:
    """podman does not wait for a reader that will not come."""
    engine = 0

    def kill_agent(data: bytes) -> None:
        nonlocal engine
        if not engine:
            engine = engine_of(host)
            kill(host.process.pid)

    dump(host, agent, tree, kib=64 << 10)
    with pytest.raises(AgentUnreachable):
        agent.end_dump(kill_agent)
    wait_for(lambda: not alive(engine))
    host.process.wait()


# ---- the wrapper -----------------------------------------------------------------------------


@pytest.fixture
def wrapped(host: AgentHost, tmp_path: Path) -> Path:
    """A directory as the agent makes it for an engine's PATH; its CRIU prints its environment."""
    directory = tmp_path / "dump" / "path"
    directory.mkdir(parents=True, mode=0o700)
    (directory / "criu").symlink_to(host.program)
    (directory / "real").symlink_to("/usr/bin/env")
    return directory


def call(directory: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{directory}:/usr/bin:/bin" if path is None else path, "A": "1"}
    command = [directory / "criu"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_the_real_criu_gets_the_agents_configuration(wrapped: Path) -> None:
    done = call(wrapped)
    assert done.returncode == 0
    assert {*done.stdout.splitlines()} == {
        "A=1", "PATH=/usr/bin:/bin", f"OVR_HOOK_SOCKET={wrapped.parent}/hook",
        f"CRIU_CONFIG_FILE={wrapped}/criu.conf",
    }  # fmt: skip


def test_a_path_of_one_directory(wrapped: Path) -> None:
    done = call(wrapped, str(wrapped))
    assert "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" in done.stdout


@pytest.mark.parametrize("path", ["", "/usr/bin", ":{0}", "relative:{0}", "/nowhere:{0}"])
def test_another_directory_is_first(wrapped: Path, path: str) -> None:
    done = call(wrapped, path.format(wrapped))
    assert (done.returncode, done.stdout) == (127, "")


def test_a_directory_that_others_can_enter(wrapped: Path) -> None:
    wrapped.chmod(0o755)
    assert call(wrapped).returncode == 127


def test_it_never_runs_itself(host: AgentHost, wrapped: Path) -> None:
    (wrapped / "real").unlink()
    (wrapped / "real").symlink_to(host.program)
    assert call(wrapped).returncode == 127
    # Nor by way of a link of the same name.
    other = wrapped.parent / "criu"
    other.symlink_to(host.program)
    (wrapped / "real").unlink()
    (wrapped / "real").symlink_to(other)
    assert call(wrapped).returncode == 127


def test_a_link_that_is_not_absolute(wrapped: Path) -> None:
    (wrapped / "real").unlink()
    (wrapped / "real").symlink_to("../../env")
    assert call(wrapped).returncode == 127


def test_another_name_of_the_directory(wrapped: Path) -> None:
    other = wrapped.with_name("other")
    wrapped.rename(other)
    assert call(other).returncode == 127


def test_the_configuration(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    dump(host, agent, tree)
    (directory,) = host.restores
    script = f'action-script "{host.program}"'
    parent = f'prev-images-dir "{directory}/images"'
    lines = (directory / "path" / "criu.conf").read_text().splitlines()
    assert lines == [script, script, "track-mem", parent]
    assert json.loads(agent.find("podman", "web").data)["id"] == ID
    open_gate(host)
    agent.abort()
    assert_unharmed(host, tree)
