"""A restore with the real agent, up to go; who may say what; pages of the tree that it holds."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from ovr.errors import AttemptFailed, ImagesUnsupported
from ovr.guest import protocol
from ovr.guest.client.agent import Agent
from ovr.guest.client.requests import Portion
from ovr.guest.codes import Code
from ovr.guest.message import Message
from ovr.guest.protocol import Touching
from tests.unit.agent_host import (
    AgentHost,
    agent_host,
    alive,
    assert_gone,
    begin,
    fails,
    kill,
    wait_for,
)


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


def modes_of(directory: Path) -> dict[str, str]:
    """The permissions of a directory and all that is below it."""
    paths = [directory, *directory.rglob("*")]
    return {str(path.relative_to(directory)): f"{path.stat().st_mode & 0o777:o}" for path in paths}


def test_images_can_be_opened_from_a_user_namespace(tmp_path: Path) -> None:
    """CRIU does so, as another user; whatever the agent's umask is, only the images are open."""
    before = os.umask(0o077)
    try:
        with agent_host(tmp_path) as host, host.connect() as agent:
            os.umask(before)
            agent.begin({"core-1.img": b"x"}, criu_options=host.criu_options())
            (directory,) = host.restores
            assert modes_of(directory / "images") == {".": "711", "core-1.img": "644"}
            assert f"{directory.stat().st_mode & 0o777:o}" == "700"
            assert f"{directory.parent.stat().st_mode & 0o777:o}" == "700"
            agent.abort()
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_no_other_user_reaches_images(host: AgentHost, agent: Agent) -> None:
    """Though they are open to all: the directories above them are not."""
    skeleton = begin(host, agent)
    (directory,) = host.restores
    images = directory.relative_to(host.directory) / "images"
    host.directory.chmod(0o711)
    for path in (images / "core-1.img", images, images.parent):
        as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "ls", str(path)]
        # From where it can get: directories of pytest's above would keep it out as well.
        done = subprocess.run(
            ["sh", "-c", 'cd "$0" && exec "$@"', str(host.directory), *as_nobody],
            capture_output=True, check=False,
        )  # fmt: skip
        assert b"Permission denied" in done.stderr
        assert not done.stdout
    assert alive(*skeleton.tasks)
    agent.abort()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/x", "x" * 256, ".hidden"])
def test_bad_names(host: AgentHost, agent: Agent, name: str) -> None:
    with fails(Code.IMAGES):
        agent.begin({"good.img": b"", name: b"x"}, criu_options=host.criu_options())
    wait_for(lambda: not host.restores)


def test_name_with_nul_is_not_even_sent(host: AgentHost, agent: Agent) -> None:
    with pytest.raises(ImagesUnsupported):
        agent.begin({"a\0b": b"x"}, criu_options=host.criu_options())
    wait_for(lambda: not host.restores)


def test_two_sessions(host: AgentHost) -> None:
    with host.connect() as first, host.connect(serial=True) as second:
        skeleton = begin(host, first)
        second.ping()
        with fails(Code.BUSY):
            begin(host, second)
        assert alive(*skeleton.tasks)
        assert first.go().pid == skeleton.root_pid
        kill(*skeleton.tasks)


def test_only_the_owner_says_go(host: AgentHost) -> None:
    with host.connect() as first, host.connect() as second:
        skeleton = begin(host, first)
        with fails(Code.BUSY):
            second.go()
        with host.connect() as third:
            third.abort()  # of nothing: this session has no restore
        assert not host.marks
        assert alive(*skeleton.tasks)
        first.abort()


def test_go_with_nothing_held(agent: Agent) -> None:
    with fails(Code.IDLE):
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
    ranges = [(start, PAGE), (start + PAGE, end - start - PAGE)]
    agent.touch([Portion(skeleton.root_pid, Touching.KEEP, ranges)])
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
        agent.touch([Portion(pid, Touching.KEEP, [(start, PAGE)])])
        memory.seek(start)
        assert memory.read(PAGE) == before
        agent.touch([Portion(pid, Touching.DISCARD, [(start, PAGE)])])
        memory.seek(start)
        assert memory.read(PAGE) == b"\0" + before[1:]
    agent.abort()
    assert_gone(host, skeleton)


def test_touch_pages_of_several_tasks_in_one_request(
    host: AgentHost, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each portion in its own task, with its own `keep`; no task of somebody else's among them."""
    requests: list[protocol.Touch] = []
    send = agent._send

    def count(message: Message) -> None:
        if isinstance(message, protocol.Touch):
            requests.append(message)
        send(message)

    monkeypatch.setattr(agent, "_send", count)
    skeleton = begin(host, agent)
    (child,) = {*skeleton.tasks} - {skeleton.root_pid}
    places = {pid: mapping_of(pid, "[stack]")[:2] for pid in (skeleton.root_pid, child)}
    ranges = {pid: [(start, end - start)] for pid, (start, end) in places.items()}
    with fails(Code.TASK):
        portions = [
            Portion(child, Touching.KEEP, ranges[child]),
            Portion(os.getpid(), Touching.KEEP, ranges[child]),
        ]
        agent.touch(portions)
    for pid, (start, end) in places.items():
        assert not all(present(pid, start, (end - start) // PAGE))
    agent.touch(
        [
            Portion(pid, Touching.KEEP if pid == child else Touching.DISCARD, ranges[pid])
            for pid in places
        ]
    )
    for pid, (start, end) in places.items():
        assert all(present(pid, start, (end - start) // PAGE))
    assert len(requests) == 2
    agent.abort()
    assert_gone(host, skeleton)


def test_portions_and_ranges_must_agree(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    start, _, _ = mapping_of(skeleton.root_pid, "[stack]")
    pid = skeleton.root_pid
    for portions in (
        (), (pid,), (pid, 1), (pid, 1, 0), (pid, 1, 2), (pid, 3, 1), (pid, 1, 1, pid),
        (pid, 1, 1, pid, 1, 1), (pid, 1, 1 << 32 | 1),
    ):  # fmt: skip
        agent._send(protocol.Touch(portions, (start, PAGE)))
        with fails(Code.PROTOCOL):
            agent._outcome(protocol.Touched, time.monotonic() + 5)
    agent.abort()
    assert_gone(host, skeleton)


def test_touch_and_map_only_what_is_held(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    start, _, _ = mapping_of(skeleton.root_pid, "[stack]")
    for pid in (os.getpid(), host.process.pid, 0, 1, 1 << 31, (1 << 32) - 1, 1 << 32):
        with fails(Code.TASK):
            agent.touch([Portion(pid, Touching.KEEP, [(start, PAGE)])])
    for ranges in ([(start, 100)], [(start, 0)], [(start + 1, PAGE)], [(1 << 63, 1 << 63)]):
        with fails(Code.PROTOCOL):
            agent.touch([Portion(skeleton.root_pid, Touching.KEEP, ranges)])
    with pytest.raises(AttemptFailed, match="touch a page"):
        agent.touch([Portion(skeleton.root_pid, Touching.DISCARD, [(0, PAGE)])])
    for file in ("exe", "../1/mem", "fd/0/", "fd/x", "map_files/1-2;", "mem"):
        with pytest.raises(AttemptFailed, match="neither a descriptor nor a mapping"):
            agent.map(skeleton.root_pid, file, PAGE, [(0, PAGE)])
    with pytest.raises(AttemptFailed, match="cannot"):
        agent.map(skeleton.root_pid, "fd/0", PAGE, [(0, PAGE)])
    agent.abort()
    assert_gone(host, skeleton)


def shared_fd(pid: int) -> int:
    """Where a task of the tree has its memfd."""
    fds = Path(f"/proc/{pid}/fd").iterdir()
    return next(int(link.name) for link in fds if "memfd:shared" in str(link.readlink()))


def test_map_a_memfd_of_the_tree(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    fd = shared_fd(skeleton.root_pid)
    mapping = agent.map(skeleton.root_pid, f"fd/{fd}", 16 * PAGE, [(0, PAGE), (8 * PAGE, PAGE)])
    assert present(mapping.pid, mapping.address, 16) == [n in (0, 8) for n in range(16)]
    agent.touch([Portion(mapping.pid, Touching.KEEP, [(mapping.address + PAGE, 2 * PAGE)])])
    assert present(mapping.pid, mapping.address, 4) == [True, True, True, False]
    agent.go()
    wait_for(lambda: host.marks == set(skeleton.tasks))
    assert not alive(mapping.pid)
    kill(*skeleton.tasks)


def test_mappers_go_with_the_tree(host: AgentHost, agent: Agent) -> None:
    skeleton = begin(host, agent)
    fd = shared_fd(skeleton.root_pid)
    mapping = agent.map(skeleton.root_pid, f"fd/{fd}", PAGE, [(0, PAGE)])
    agent.close()
    wait_for(lambda: not alive(mapping.pid))
    assert_gone(host, skeleton)


def scheduling(pid: int) -> tuple[int, int, int]:
    """Policy, nice value and timer slack of a process."""
    slack = int(Path(f"/proc/{pid}/timerslack_ns").read_text())
    return os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid), slack


@pytest.mark.skipif(os.geteuid() != 0, reason="real-time priority is for root")
def test_the_agent_is_first_while_it_restores_and_nobody_inherits_it(
    host: AgentHost, agent: Agent
) -> None:
    before = scheduling(host.process.pid)
    assert before[0] == os.SCHED_OTHER
    skeleton = begin(host, agent)
    assert scheduling(host.process.pid)[0] == os.SCHED_FIFO
    with host.connect() as other:
        program = other.spawn(["sleep", "1000"])
        assert scheduling(program) == before
        pool = other.warm(2 << 20)
        assert scheduling(pool.pid) == before
        kill(program)
    assert [scheduling(task)[0] for task in skeleton.tasks] == [os.SCHED_OTHER] * 2
    agent.go()
    wait_for(lambda: host.marks == set(skeleton.tasks))
    wait_for(lambda: scheduling(host.process.pid) == before)
    kill(*skeleton.tasks)


@pytest.mark.skipif(os.geteuid() != 0, reason="to choose pids is for root")
def test_another_process_gets_the_pid_of_who_allocated_memory(
    host: AgentHost, agent: Agent
) -> None:
    """Its end is its own: the host hears of it."""
    # Another program of this machine may get the pid, and keep it: then with another one.
    assert any(_pid_is_given_again(host, agent) for _ in range(10))


def _pid_is_given_again(host: AgentHost, agent: Agent) -> bool:
    skeleton = begin(host, agent)
    fd = shared_fd(skeleton.root_pid)
    mapping = agent.map(skeleton.root_pid, f"fd/{fd}", 16 * PAGE, [(0, PAGE)])
    agent.go()
    wait_for(lambda: set(skeleton.tasks) <= host.marks)
    assert not alive(mapping.pid)
    kill(*skeleton.tasks)
    for _ in range(50):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(mapping.pid - 1))
        done = agent.run(["sh", "-c", "echo $$"], timeout=30)
        if int(done.stdout) == mapping.pid:
            return True
    return False
