"""A dump with the real agent: what the host gets, and that the tree's memory is only read."""

import ctypes
import mmap
import os
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovr.errors import AttemptFailed, CriuFailed
from ovr.guest import dump_protocol
from ovr.guest.client.requests import Portion
from ovr.guest.codes import Code
from ovr.guest.protocol import Touching
from ovr.lab.agent import LabAgent
from tests.unit.agent_host import AgentHost, alive, one_link, wait_for
from tests.unit.dump_host import (
    STATS,
    Images,
    Tree,
    assert_unharmed,
    begin,
    counting,
    dump,
    expected,
    large,
    options,
)

PAGE = mmap.PAGESIZE
SOFT_DIRTY = 1 << 55  # Documentation/admin-guide/mm/pagemap.rst


@pytest.fixture
def tree(host: AgentHost) -> Iterator[Tree]:
    with counting(host) as tree:
        yield tree


def test_the_tree_is_held_and_ended(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    images = Images()
    held = begin(host, agent, tree, images)
    assert images == expected()
    assert not images.open
    assert held.root_pid == tree.process.pid
    assert sorted(held.tasks) == sorted(tree.pids)
    assert tree.tracers() == {held.criu_pid}
    assert tree.is_stopped()
    assert agent.end_dump() == STATS
    wait_for(lambda: not alive(*tree.pids))
    wait_for(lambda: not host.restores)


def test_the_tree_runs_on_if_it_is_to(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    images = Images()
    dump(agent, tree.process.pid, images.save, criu_options=options(host), leave_running=True)
    assert tree.is_stopped()
    assert agent.end_dump() == STATS
    assert_unharmed(host, tree)


@one_link
def test_dumps_in_a_row_in_one_session(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    for _ in range(3):
        begin(host, agent, tree)
        agent.abort()
        # When abort() returns it is over.
        assert tree.tracers() == {0}
        assert not host.restores
    assert_unharmed(host, tree)


def test_many_megabytes_and_a_slow_reader(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """The agent keeps little of what is not read yet, and answers others meanwhile."""
    images, kib = Images(pause=0.02), 12 << 10
    done = threading.Thread(
        target=begin, args=(host, agent, tree, images, options(host, "ok", kib))
    )
    before = resident(host.process.pid)
    done.start()
    wait_for(lambda: len(images.get("pipes-data.img", b"")) > 1 << 20)
    with host.connect() as other:
        other.ping()
    grown = resident(host.process.pid) - before
    done.join()
    assert images == expected(kib)
    assert grown < 4 << 20
    agent.abort()
    assert_unharmed(host, tree)


def resident(pid: int) -> int:
    """The resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def test_images_come_without_a_word_of_the_host(host: AgentHost, tree: Tree) -> None:
    """Whatever the buffers of the link take: the agent does not wait for it to wake it up."""
    with host.connect() as agent:
        images = Images()
        started = time.monotonic()
        # The interval of the host's messages is a fourth of this.
        begin(host, agent, tree, images, options(host, "ok", 32 << 10), silence=400.0)
        assert time.monotonic() - started < 60
        assert images == expected(32 << 10)
        agent.abort()
    assert_unharmed(host, tree)


@one_link
def test_only_regular_files_are_images(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """Links, such as that to the parent, pipes and sockets are not opened."""
    images = Images()
    begin(host, agent, tree, images, options(host, "hostile"))
    assert images == expected()
    agent.abort()
    assert_unharmed(host, tree)


def test_pages_images_come_on_request(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    begin(host, agent, tree, criu_options=options(host, "ok", 3000))
    for _ in range(2):
        pages = Images()
        agent.fetch("pages-1.img", pages.save)
        assert pages == {"pages-1.img": large(3000)}
        assert not pages.open
    assert tree.is_stopped()
    agent.end_dump()
    wait_for(lambda: not alive(*tree.pids))


@one_link
@pytest.mark.parametrize(
    "name", ["pages-2.img", "core-1.img", "pages-/../core-1.img", "pages-" + "x" * 300, ""]
)
def test_what_is_no_pages_image(host: AgentHost, agent: LabAgent, tree: Tree, name: str) -> None:
    begin(host, agent, tree)
    with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.IMAGES):
        agent.fetch(name, Images().save)
    agent.fetch("pages-1.img", Images().save)
    agent.abort()
    assert_unharmed(host, tree)


@one_link
@pytest.mark.parametrize("pid", [0, 1, 1 << 31, (1 << 32) + 2])
def test_no_such_process(host: AgentHost, agent: LabAgent, tree: Tree, pid: int) -> None:
    with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.TASK):
        dump(agent, pid, Images().save, criu_options=options(host))
    assert_unharmed(host, tree)


@one_link
def test_a_dump_needs_a_parent(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.PROTOCOL):
        agent.start_dump(tree.process.pid, {}, criu_options=options(host))
    assert_unharmed(host, tree)


@one_link
def test_one_at_a_time(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    begin(host, agent, tree)
    for act in (lambda other: begin(host, other, tree), LabAgent.end_dump):
        busy = pytest.raises(AttemptFailed, check=lambda error: error.code == Code.BUSY)
        with host.connect() as other, busy:
            act(other)
    assert tree.is_stopped()
    agent.abort()
    assert_unharmed(host, tree)


@one_link
@pytest.mark.parametrize("own", [False, True])
def test_another_tree_than_the_one_held(
    host: AgentHost, agent: LabAgent, tree: Tree, *, own: bool
) -> None:
    report = os.getpid() if own else 2
    with pytest.raises(AttemptFailed, match="another criu than the agent's") as caught:
        begin(host, agent, tree, criu_options=options(host, "ok", 4, "--report", str(report)))
    assert caught.value.code == Code.CRIU
    assert "runs on" in caught.value.hint
    assert_unharmed(host, tree)


@one_link
def test_no_tree_is_held(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.CRIU):
        begin(host, agent, tree, criu_options=options(host, "no-tree"))
    assert_unharmed(host, tree)


@one_link
@pytest.mark.parametrize("stage", ["start", "seized"])
def test_criu_fails(host: AgentHost, agent: LabAgent, tree: Tree, stage: str) -> None:
    with pytest.raises(CriuFailed, match=rf"failed \(1\): .*at {stage}"):
        begin(host, agent, tree, criu_options=options(host, f"fail-{stage}"))
    assert_unharmed(host, tree)


@one_link
def test_criu_fails_at_the_last_moment(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    begin(host, agent, tree, criu_options=options(host, "fail-end"))
    with pytest.raises(CriuFailed, match=r"failed \(1\): .*at end"):
        agent.end_dump()
    assert_unharmed(host, tree)


@one_link
def test_criu_is_not_there(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    criu = host.directory / "criu"
    there = criu.rename(host.directory / "aside")
    with pytest.raises(AttemptFailed, match="criu cannot be started: No such file"):
        begin(host, agent, tree)
    there.rename(criu)
    assert_unharmed(host, tree)


@one_link
def test_log_is_kept_on_request(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    with pytest.raises(CriuFailed):
        dump(
            agent, tree.process.pid, Images().save,
            criu_options=options(host, "fail-seized"), keep_log=True,
        )  # fmt: skip
    (directory,) = host.restores
    assert "at seized" in (directory / "criu.log").read_text()
    assert not [*directory.glob("dump"), *directory.glob("images")]


# ---- the tree's memory ---------------------------------------------------------------------


_PAGES = 64
_SUBJECT = f"""
import ctypes, mmap, sys

ctypes.CDLL(None).prctl(1, 9)
memory = mmap.mmap(-1, {_PAGES * PAGE}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, {_PAGES}, 2):
    memory[page * {PAGE}] = page + 1
at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
print(at, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def subject(host: AgentHost) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process with memory of which every other page was written to, and where it is."""
    with counting(host):
        process = subprocess.Popen(
            ["python3", "-c", _SUBJECT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with process:
            assert process.stdout is not None
            try:
                yield process, int(process.stdout.readline())
            finally:
                process.kill()


def entries(pid: int, start: int) -> tuple[int, ...]:
    """The subject's page table entries, as /proc/PID/pagemap has them."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(start // PAGE * 8)
        return struct.unpack(f"{_PAGES}Q", pagemap.read(_PAGES * 8))


def content(pid: int, start: int) -> bytes:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(start)
        return memory.read(_PAGES * PAGE)


def soft_dirty_works() -> bool:
    """Whether this kernel was built with CONFIG_MEM_SOFT_DIRTY."""
    with mmap.mmap(-1, _PAGES * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[0] = 1
        view = ctypes.c_char.from_buffer(memory)
        found = entries(os.getpid(), ctypes.addressof(view))
        del view
    return bool(SOFT_DIRTY & found[0])


def hold(host: AgentHost, agent: LabAgent, pid: int) -> None:
    dump(agent, pid, Images().save, criu_options=options(host), leave_running=True)


@one_link
def test_touching_to_read_changes_nothing(
    host: AgentHost, agent: LabAgent, subject: tuple[subprocess.Popen[bytes], int]
) -> None:
    process, start = subject
    hold(host, agent, process.pid)
    Path(f"/proc/{process.pid}/clear_refs").write_text("4")
    before = entries(process.pid, start)
    agent.touch([Portion(process.pid, Touching.READ, [(start, _PAGES * PAGE)])])
    after = entries(process.pid, start)
    memory = content(process.pid, start)
    for page in range(_PAGES):
        written = page % 2 == 0
        assert memory[page * PAGE] == (page + 1 if written else 0)
        if written:
            assert after[page] == before[page]
    assert not any(memory[n] for n in range(len(memory)) if n % (2 * PAGE))
    # The same frames: no page that was there has gone, or was copied.
    if soft_dirty_works():
        assert not any(entry & SOFT_DIRTY for entry in after)
    agent.end_dump()
    assert process.poll() is None


@one_link
@pytest.mark.parametrize("how", [Touching.KEEP, Touching.DISCARD])
def test_the_memory_of_a_dumped_tree_is_not_written(
    host: AgentHost,
    agent: LabAgent,
    subject: tuple[subprocess.Popen[bytes], int],
    how: Touching,
) -> None:
    process, start = subject
    hold(host, agent, process.pid)
    before = content(process.pid, start)
    with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.TASK):
        agent.touch([Portion(process.pid, how, [(start, PAGE)])])
    assert content(process.pid, start) == before
    agent.end_dump()


@one_link
def test_only_the_held_tree_is_touched(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    held = begin(host, agent, tree)
    for pid in (os.getpid(), host.process.pid, held.criu_pid, 1):
        with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.TASK):
            agent.touch([Portion(pid, Touching.READ, [(1 << 20, PAGE)])])
    agent.abort()
    assert_unharmed(host, tree)


def test_the_messages_of_a_dump_are_not_those_of_a_restore(
    host: AgentHost, agent: LabAgent, tree: Tree
) -> None:
    """Out of order they end the session, and the tree runs."""
    begin(host, agent, tree)
    agent._send(dump_protocol.Dump(tree.process.pid, (), False, 1000, 1000, 2, False))
    with pytest.raises(AttemptFailed, match="out of order"):
        agent.end_dump()
    assert_unharmed(host, tree)
