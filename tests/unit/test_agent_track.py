"""The soft-dirty bits of a tree that is about to be dumped, and how it is frozen for them."""

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovr.errors import AttemptFailed
from ovr.guest import dump_protocol
from ovr.guest.codes import Code
from ovr.guest.protocol import Stopped
from ovr.lab.agent import LabAgent
from tests.unit.agent_host import PYTHON, AgentHost, alive, state_of, wait_for
from tests.unit.dump_host import (
    PARENT,
    STATS,
    Images,
    Tree,
    assert_unharmed,
    counting,
    expected,
    options,
    start,
)

_MANY = """
import ctypes, os, threading, time

ctypes.CDLL(None).prctl(1, 9)
def spawn():
    while True:
        if not (pid := os.fork()):
            os._exit(0)
        os.waitpid(pid, 0)
for _ in range(20):
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
threading.Thread(target=spawn, daemon=True).start()
print(flush=True)
while True:
    threading.Thread(target=lambda: None).start()
"""


@pytest.fixture
def tree(host: AgentHost) -> Iterator[Tree]:
    with counting(host) as tree:
        yield tree


@pytest.fixture
def waiting(host: AgentHost, agent: LabAgent, tree: Tree) -> LabAgent:
    """The session of a dump whose CRIU waits before it stops the tree."""
    agent.start_dump(tree.process.pid, PARENT, criu_options=options(host))
    return agent


def test_frozen_until_tracked(host: AgentHost, waiting: LabAgent, tree: Tree) -> None:
    assert tree.runs()
    for _ in range(3):
        waiting.freeze()
        assert tree.is_stopped()
        assert waiting.track() > 0.1
        assert tree.tracers() == {0}
        assert tree.runs()
    assert waiting.track() == 0
    waiting.freeze()
    assert waiting.track(stop=True) > 0
    images = Images()
    held = waiting.held(images.save)
    assert images == expected()
    assert sorted(held.tasks) == sorted(tree.pids)
    assert waiting.end_dump() == STATS
    wait_for(lambda: not alive(*tree.pids))


def test_threads_and_children_that_come_and_go(host: AgentHost, agent: LabAgent) -> None:
    with (
        counting(host),
        subprocess.Popen([PYTHON, "-Sc", _MANY], stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        try:
            agent.start_dump(process.pid, PARENT, criu_options=options(host))
            for _ in range(5):
                agent.freeze()
                states = [state_of(pid) for pid in threads_of(process.pid)]
                assert len(states) > 20
                assert set(states) <= {"t", "Z"}
                agent.track()
            agent.abort()
            assert process.poll() is None
        finally:
            process.kill()


def threads_of(pid: int) -> list[int]:
    """The threads of a process and of its children."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found.append(int(task.name))
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def test_a_stopped_task_stays_stopped(host: AgentHost, waiting: LabAgent, tree: Tree) -> None:
    child = tree.pids[1]
    os.kill(child, signal.SIGSTOP)
    wait_for(lambda: state_of(child) == "T")
    waiting.freeze()
    waiting.track()
    wait_for(lambda: state_of(child) == "T")
    waiting.abort()
    os.kill(child, signal.SIGCONT)
    assert_unharmed(host, tree)


_STORM = """
import ctypes, os, signal, time

ctypes.CDLL(None).prctl(1, 9)
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"x"))
os.write(1, b"x")
while True:
    time.sleep(0.01)  # Python notices a signal right before it sleeps only afterwards
"""


def test_no_signal_is_lost(host: AgentHost, agent: LabAgent) -> None:
    """Each is sent when the last one was taken, at any moment of freezing and thawing."""
    with (
        counting(host),
        subprocess.Popen([PYTHON, "-Sc", _STORM], stdout=subprocess.PIPE, bufsize=0) as process,
    ):
        ended = threading.Event()
        taken = 0

        def send() -> None:
            nonlocal taken
            assert process.stdout is not None
            while process.stdout.read(1) and not ended.is_set():
                taken += 1
                process.send_signal(signal.SIGUSR1)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            agent.start_dump(process.pid, PARENT, criu_options=options(host))
            for _ in range(30):
                agent.freeze()
                agent.track()
            before = taken
            wait_for(lambda: taken > before)
            agent.abort()
        finally:
            ended.set()
            process.kill()
            sender.join()


def test_a_traced_task_cannot_be_frozen(host: AgentHost, waiting: LabAgent, tree: Tree) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    assert libc.ptrace(0x4206, tree.pids[1], None, None) == 0  # PTRACE_SEIZE
    with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.TREE):
        waiting.freeze()
    assert tree.runs()
    libc.ptrace(0x4207, tree.pids[1], None, None)  # PTRACE_INTERRUPT
    os.waitpid(tree.pids[1], 0x40000000)
    libc.ptrace(17, tree.pids[1], None, None)  # PTRACE_DETACH
    assert_unharmed(host, tree)


def worker_of(tree: Tree) -> int:
    """The process that has frozen the tree."""
    (pid,) = tree.tracers()
    return pid


def test_the_worker_is_killed(host: AgentHost, waiting: LabAgent, tree: Tree) -> None:
    waiting.freeze()
    os.kill(worker_of(tree), signal.SIGKILL)
    wait_for(lambda: tree.tracers() == {0})
    assert tree.runs()
    with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.TREE):
        waiting.track()
    assert_unharmed(host, tree)


def test_frozen_for_too_long(host: AgentHost, waiting: LabAgent, tree: Tree) -> None:
    """The worker's alarm, sent by us instead of by the kernel in ten seconds."""
    with waiting.keep_alive():
        waiting.freeze()
        assert b"ovr-agent" in Path(f"/proc/{worker_of(tree)}/comm").read_bytes()
        os.kill(worker_of(tree), signal.SIGALRM)
        wait_for(lambda: tree.tracers() == {0})
    with pytest.raises(AttemptFailed, match="frozen for too long"):
        waiting.track(stop=True)
    assert_unharmed(host, tree)


def test_the_parent_grows_until_the_tree_is_stopped(
    host: AgentHost, waiting: LabAgent, tree: Tree
) -> None:
    (directory,) = host.restores
    waiting.add_to_parent({"pagemap-2.img": b"new"})
    waiting.track()
    assert (directory / "images" / "pagemap-2.img").read_bytes() == b"new"
    assert (directory / "images" / "inventory.img").read_bytes() == PARENT["inventory.img"]
    waiting.abort()
    assert_unharmed(host, tree)


def test_waiting_is_not_the_time_of_criu(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    """It makes no progress meanwhile, and does not have to."""
    agent.start_dump(
        tree.process.pid, PARENT, criu_options=options(host), timeout=1.5, stall=0.5
    )  # fmt: skip
    with agent.keep_alive():
        time.sleep(3)
    agent.track(stop=True)
    agent.held(Images().save)
    agent.abort()
    assert_unharmed(host, tree)


@pytest.mark.parametrize(
    "messages",
    [
        [dump_protocol.Freeze(), dump_protocol.Freeze()],
        [dump_protocol.Track(True), dump_protocol.Freeze()],
        [dump_protocol.Fetch("pages-1.img")],
        [dump_protocol.Dump(1, (), False, 1000, 1000, 2, False)],
    ],
)
def test_out_of_order(
    host: AgentHost, waiting: LabAgent, tree: Tree, messages: list[dump_protocol.Message]
) -> None:
    for message in messages:
        waiting._send(message)
    good = (dump_protocol.Frozen, dump_protocol.Tracked, dump_protocol.Saved, Stopped)
    while isinstance(answer := waiting._receive(None), good):
        pass
    with pytest.raises(AttemptFailed, match="out of order"):
        waiting._checked(answer, dump_protocol.Dumped)
    assert_unharmed(host, tree)


def test_not_before_criu_is_there(host: AgentHost, agent: LabAgent, tree: Tree) -> None:
    start(host, agent, tree, options(host, "wait-start"))
    agent._send(dump_protocol.Freeze())
    with pytest.raises(AttemptFailed, match="out of order"):
        agent._outcome(dump_protocol.Frozen)
    (host.directory / "open").touch()
    assert_unharmed(host, tree)
