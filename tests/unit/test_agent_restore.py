"""A restore with the real agent, up to go, abort, and every way to die in between."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovr.errors import (
    AgentUnreachable,
    CriuFailed,
    ImagesUnsupported,
    PidTaken,
    RestoreFailed,
)
from ovr.guest import protocol
from ovr.vm.agent import Agent, Skeleton
from tests.unit.agent_host import (
    IMAGES,
    AgentHost,
    agent_host,
    agent_program,
    alive,
    kill,
    wait_for,
)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[AgentHost]:
    with agent_host(tmp_path) as host:
        yield host


@pytest.fixture(params=[False, True], ids=["stream", "serial"])
def agent(host: AgentHost, request: pytest.FixtureRequest) -> Iterator[Agent]:
    with host.connect(serial=request.param) as agent:
        yield agent


def begin(host: AgentHost, agent: Agent, **options: float) -> Skeleton:
    return agent.begin(IMAGES, criu_options=host.criu_options(), **options)


def assert_gone(host: AgentHost, skeleton: Skeleton) -> None:
    """No task ran, none is left, and the next restore succeeds."""
    wait_for(lambda: not alive(*skeleton.tasks, skeleton.criu_pid))
    wait_for(lambda: not host.restores)
    assert not host.marks
    with host.connect() as other:
        again = begin(host, other)
        assert not host.marks
        other.go()
        wait_for(lambda: host.marks == set(again.tasks))
    kill(*again.tasks)


def test_hello(agent: Agent, host: AgentHost) -> None:
    assert agent.hello.protocol == protocol.VERSION
    assert agent.hello.lab
    assert agent.hello.criu == "9.9.9"
    assert agent.hello.pid == host.process.pid
    assert agent.hello.kernel == Path("/proc/sys/kernel/osrelease").read_text().strip()
    assert agent.hello.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    agent.ping()


def test_go(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    assert len(skeleton.tasks) == 2
    assert skeleton.root_pid in skeleton.tasks
    status = Path(f"/proc/{skeleton.root_pid}/status").read_text()
    assert f"TracerPid:\t{skeleton.criu_pid}\n" in status
    # CRIU itself must not be able to go on by itself.
    assert "State:\tT" in Path(f"/proc/{skeleton.criu_pid}/status").read_text()
    time.sleep(0.2)
    assert not host.marks
    assert agent.go().pid == skeleton.root_pid
    wait_for(lambda: host.marks == set(skeleton.tasks))
    assert not host.restores
    # Not the agent's child any more: it may end or be replaced.
    status = Path(f"/proc/{skeleton.root_pid}/status").read_text()
    assert f"PPid:\t{host.process.pid}\n" not in status
    kill(*skeleton.tasks)


def test_images_arrive_whole(host: AgentHost, agent: Agent) -> None:
    large = bytes(range(256)) * 4096
    many = {f"core-{number}.img": str(number).encode() for number in range(2000)}
    pieces = [large[:10], b"", large[10:]]
    agent.begin({**many, "pages-1.img": pieces, "m.img": large}, criu_options=host.criu_options())
    (directory,) = host.restores
    assert directory.stat().st_mode & 0o777 == 0o700
    found = {path.name: path.read_bytes() for path in (directory / "images").iterdir()}
    assert found == {**many, "pages-1.img": large, "m.img": large}
    agent.abort()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/x", "x" * 256, ".hidden"])
def test_bad_names(host: AgentHost, agent: Agent, name: str) -> None:
    with pytest.raises(RestoreFailed, match="not a plain file name"):
        agent.begin({"good.img": b"", name: b"x"}, criu_options=host.criu_options())
    wait_for(lambda: not host.restores)


def test_name_with_nul_is_not_even_sent(host: AgentHost, agent: Agent) -> None:
    with pytest.raises(ImagesUnsupported):
        agent.begin({"a\0b": b"x"}, criu_options=host.criu_options())
    wait_for(lambda: not host.restores)


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
    time.sleep(0.8)
    assert not alive(*skeleton.tasks)
    with pytest.raises(RestoreFailed, match="silent"):
        agent.go()
    agent.ping()
    assert_gone(host, skeleton)


def test_hook_dies(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    kill(host.hook(skeleton.criu_pid))
    wait_for(lambda: not alive(*skeleton.tasks))
    with pytest.raises(RestoreFailed, match="the hook died"):
        agent.go()
    assert_gone(host, skeleton)


def test_hook_dies_as_the_host_says_go(host: AgentHost, agent: Agent) -> None:
    # Whoever is heard first: all of the tree runs, or nothing of it ever did.
    for _ in range(5):
        skeleton = begin(host, agent)
        os.kill(host.hook(skeleton.criu_pid), signal.SIGKILL)  # and do not wait
        try:
            agent.go()
        except RestoreFailed:
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
        with pytest.raises(RestoreFailed, match="criu died"):
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
        for pid in others:
            os.kill(pid, signal.SIGCONT)
    assert not host.marks
    # The agent hears of both at once, in this order or the other.
    with pytest.raises(RestoreFailed, match=r"criu died|criu in the guest failed \(137\)"):
        agent.go()


def test_agent_dies(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    kill(host.process.pid)
    wait_for(lambda: not alive(*skeleton.tasks, skeleton.criu_pid))
    assert not host.marks
    with pytest.raises(AgentUnreachable):
        agent.go()
    host.process.wait()


def test_agent_is_told_to_end(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    host.process.terminate()
    assert host.process.wait() == 0
    assert not alive(*skeleton.tasks, skeleton.criu_pid)
    assert not host.marks
    assert not host.restores


def test_agent_dies_before_the_hook(host: AgentHost, agent: Agent) -> None:
    # The stand-in sleeps long before its scripts; then there is nobody to ask: it gives up.
    for message in (
        protocol.Files(("a",), (b"",)),
        protocol.Begin(host.criu_options("ok"), 60000, 60000, 2, False, ()),
    ):
        agent._send(message)
    wait_for(lambda: host.restores)
    kill(host.process.pid)
    host.process.wait()
    time.sleep(1.5)
    assert not host.marks


def test_criu_takes_too_long(host: AgentHost, agent: Agent) -> None:
    with pytest.raises(RestoreFailed, match="took too long"):
        agent.begin(IMAGES, criu_options=host.criu_options("slow"), timeout=1.0)
    assert not host.marks
    assert not host.restores


def test_link_breaks_while_criu_builds(host: AgentHost, agent: Agent) -> None:
    for message in (
        protocol.Files(("a",), (b"",)),
        protocol.Begin(host.criu_options("slow"), 60000, 60000, 2, False, ()),
    ):
        agent._send(message)
    wait_for(lambda: host.restores)
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
    assert not alive(*skeleton.tasks)


def test_criu_is_not_there(tmp_path: Path) -> None:
    with agent_host(tmp_path) as host, host.connect() as agent:
        (tmp_path / "criu").unlink()
        with pytest.raises(RestoreFailed, match="criu cannot be started: No such file"):
            begin(host, agent)
        wait_for(lambda: not host.restores)


def test_agent_whose_program_was_replaced(tmp_path: Path) -> None:
    # CRIU would start another program than the one that holds the other end.
    program, new = tmp_path / "ovr-agent", tmp_path / "new"
    shutil.copy(agent_program(), program)
    with agent_host(tmp_path, program) as host, host.connect() as agent:
        shutil.copy(program, new)
        new.rename(program)
        with pytest.raises(RestoreFailed, match="program file was replaced, restart the agent"):
            begin(host, agent)
        wait_for(lambda: not host.restores)


def test_log_is_kept_on_request(host: AgentHost, agent: Agent) -> None:
    with pytest.raises(CriuFailed):
        agent.begin(IMAGES, criu_options=host.criu_options("fail"), keep_log=True)
    (directory,) = host.restores
    assert "Error" in (directory / "restore.log").read_text()
    assert not (directory / "images").exists()


def test_two_sessions(host: AgentHost) -> None:
    with host.connect() as first, host.connect(serial=True) as second:
        skeleton = begin(host, first)
        second.ping()
        with pytest.raises(RestoreFailed, match="busy"):
            begin(host, second)
        assert alive(*skeleton.tasks)
        assert first.go().pid == skeleton.root_pid
        kill(*skeleton.tasks)


def test_only_the_owner_says_go(host: AgentHost) -> None:
    with host.connect() as first, host.connect() as second:
        skeleton = begin(host, first)
        with pytest.raises(RestoreFailed, match="busy"):
            second.go()
        with host.connect() as third:
            third.abort()  # of nothing: this session has no restore
        assert not host.marks
        assert alive(*skeleton.tasks)
        first.abort()


def test_go_with_nothing_held(agent: Agent) -> None:
    with pytest.raises(RestoreFailed, match="no restore is under way"):
        agent.go()
    agent.ping()


def test_second_agent_refuses_the_same_directory(host: AgentHost, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "run").symlink_to(tmp_path / "run")
    with pytest.raises(AssertionError), agent_host(other):
        pass


def test_leftovers_are_removed_at_start(tmp_path: Path) -> None:
    left = tmp_path / "run" / "restore-abcdef" / "images"
    left.mkdir(parents=True)
    (left / "core-1.img").write_bytes(b"x")
    with agent_host(tmp_path) as host:
        assert not host.restores


PAGE = 4096


def mapping_of(pid: int, name: str) -> tuple[int, int, str]:
    """Bounds and line of the first mapping with that name in /proc/PID/maps."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith(name):
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            return start, end, line
    raise AssertionError(f"{pid} has no {name}")


def present(pid: int, start: int, pages: int) -> list[bool]:
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(start // PAGE * 8)
        words = memoryview(pagemap.read(pages * 8)).cast("Q")
    return [bool(word >> 63) for word in words]


def test_touch(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    start, end, line = mapping_of(skeleton.root_pid, "[stack]")
    assert "rw" in line
    pages = (end - start) // PAGE
    assert not all(present(skeleton.root_pid, start, pages))
    agent.touch(skeleton.root_pid, [(start, PAGE), (start + PAGE, end - start - PAGE)], keep=True)
    assert all(present(skeleton.root_pid, start, pages))
    agent.go()
    wait_for(lambda: host.marks == set(skeleton.tasks))
    kill(*skeleton.tasks)


def test_touch_what_the_task_cannot_write(host: AgentHost, agent: Agent) -> None:
    """A page of a read-only file mapping becomes the task's own; with `keep`, content and all."""
    skeleton = begin(host, agent)
    pid = skeleton.root_pid
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    line = next(line for line in maps if " r--p " in line and "/" in line)
    start = int(line.split("-")[0], 16)
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(start)
        before = memory.read(PAGE)
        agent.touch(pid, [(start, PAGE)], keep=True)
        memory.seek(start)
        assert memory.read(PAGE) == before
        agent.touch(pid, [(start, PAGE)], keep=False)
        memory.seek(start)
        assert memory.read(PAGE) == b"\0" + before[1:]
    agent.abort()
    assert_gone(host, skeleton)


def test_touch_and_map_only_what_is_held(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    start, _, _ = mapping_of(skeleton.root_pid, "[stack]")
    for pid in (os.getpid(), host.process.pid, 0, 1, 1 << 31):
        with pytest.raises(RestoreFailed, match="not a task of the tree"):
            agent.touch(pid, [(start, PAGE)], keep=True)
    for ranges in ([(start, 100)], [(start, 0)], [(start + 1, PAGE)], [(1 << 63, 1 << 63)]):
        with pytest.raises(RestoreFailed, match="bad ranges"):
            agent.touch(skeleton.root_pid, ranges, keep=True)
    with pytest.raises(RestoreFailed, match="touch a page"):
        agent.touch(skeleton.root_pid, [(0, PAGE)], keep=False)
    for file in ("exe", "../1/mem", "fd/0/", "fd/x", "map_files/1-2;", "mem"):
        with pytest.raises(RestoreFailed, match="neither a descriptor nor a mapping"):
            agent.map(skeleton.root_pid, file, PAGE, [(0, PAGE)])
    with pytest.raises(RestoreFailed, match="cannot"):
        agent.map(skeleton.root_pid, "fd/0", PAGE, [(0, PAGE)])
    agent.abort()
    assert_gone(host, skeleton)


def test_map_a_memfd_of_the_tree(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    fd = next(
        int(link.name)
        for link in Path(f"/proc/{skeleton.root_pid}/fd").iterdir()
        if "memfd:shared" in str(link.readlink())
    )
    mapping = agent.map(skeleton.root_pid, f"fd/{fd}", 16 * PAGE, [(0, PAGE), (8 * PAGE, PAGE)])
    assert present(mapping.pid, mapping.address, 16) == [n in (0, 8) for n in range(16)]
    agent.touch(mapping.pid, [(mapping.address + PAGE, 2 * PAGE)], keep=True)
    assert present(mapping.pid, mapping.address, 4) == [True, True, True, False]
    agent.go()
    wait_for(lambda: host.marks == set(skeleton.tasks))
    assert not alive(mapping.pid)
    kill(*skeleton.tasks)


def test_mappers_go_with_the_tree(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    fds = Path(f"/proc/{skeleton.root_pid}/fd").iterdir()
    fd = next(int(link.name) for link in fds if "memfd:shared" in str(link.readlink()))
    mapping = agent.map(skeleton.root_pid, f"fd/{fd}", PAGE, [(0, PAGE)])
    agent.close()
    wait_for(lambda: not alive(mapping.pid))
    assert_gone(host, skeleton)
