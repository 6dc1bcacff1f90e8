"""The commit of a move in its source, with the guest's CRIU: whatever dies, the tree stays put."""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import ovr
from ovr import lab
from ovr.attempt.attempt import Attempt
from ovr.dump.parent import Parent
from ovr.errors import AttemptFailed
from ovr.guest.client.agent import Agent
from ovr.guest.client.results import HeldTree
from ovr.guest.codes import Code
from ovr.lab import demo
from tests import subject
from tests.vm.conftest import EVERYTHING, PREFIX

pytestmark = pytest.mark.timeout(1200)
SIZE = 8 << 20
OWN = "/sys/fs/cgroup/moving"
PATIENCE = 120.0


@pytest.fixture(scope="module")
def vm() -> Iterator[lab.LabVm]:
    with demo.lab_vm(f"{PREFIX}prepare", suite="trixie", memory="640M") as vm:
        subject.install(vm)
        yield vm


@pytest.fixture
def tree(vm: lab.LabVm) -> Iterator[tuple[int, int]]:
    """A process with threads and its child, in cgroups of their own."""
    root = subject.start(vm, SIZE)
    child = int(subject.must(vm, f"pgrep -P {root}"))
    subject.must(
        vm,
        f"""
        set -e; mkdir -p {OWN}/root {OWN}/child
        echo {root} > {OWN}/root/cgroup.procs; echo {child} > {OWN}/child/cgroup.procs
    """,
    )
    yield root, child
    subject.end(vm)
    # After a failed test there are more.
    subject.must(vm, f"rmdir {OWN}/*/*/ || true; rmdir {OWN}/root {OWN}/child {OWN}")


@contextmanager
def session(vm: lab.LabVm) -> Iterator[tuple[Agent, ovr.Vm]]:
    with ovr.attach(f"lab:{vm.name}") as attached, Attempt(attached) as attempt:
        yield attempt.agent, attached


def hold(agent: Agent, attached: ovr.Vm, root: int) -> HeldTree:
    """Have CRIU dump the tree and hold it."""
    parent = Parent(attached.kernel, root)
    agent.start_dump(root, parent.new_images(), silence=PATIENCE)
    with agent.keep_alive():
        agent.add_to_parent(parent.new_images())
        agent.track(stop=True)
        return agent.held(lambda name, data: None)


def to_doubt(vm: lab.LabVm, root: int) -> tuple[str, HeldTree]:
    """Prepare the tree, and break the link."""
    move = secrets.token_hex(16)
    with session(vm) as (agent, attached):
        held = hold(agent, attached, root)
        agent.prepare(move)
        assert agent.doubts() == ()
    return move, held


def run_times(vm: lab.LabVm, tree: tuple[int, int]) -> str:
    """How long each thread has run."""
    paths = " ".join(f"/proc/{pid}/task/*/schedstat" for pid in tree)
    return subject.must(vm, f"cat {paths}")


def assert_frozen(vm: lab.LabVm, tree: tuple[int, int], move: str) -> None:
    before = run_times(vm, tree)
    time.sleep(1)
    assert run_times(vm, tree) == before
    events = f"{OWN}/root/ovr-move-{move}/cgroup.events {OWN}/child/ovr-move-{move}/cgroup.events"
    assert subject.must(vm, f"cat {events}").count("frozen 1") == 2


def assert_as_before(vm: lab.LabVm, tree: tuple[int, int]) -> None:
    """It runs, whole, in its own cgroups, and nothing is left of the move."""
    assert subject.ask(vm).wrong == 0
    for pid, name in zip(tree, ("root", "child"), strict=True):
        assert subject.must(vm, f"cat {OWN}/{name}/cgroup.procs").split() == [str(pid)]
        assert subject.must(vm, f"ls -d {OWN}/{name}/*/ || true").strip() == ""
    assert untraced(vm, tree)


def untraced(vm: lab.LabVm, tree: tuple[int, int]) -> bool:
    lines = subject.must(
        vm, " ".join(["grep", "-h", "TracerPid", *(f"/proc/{p}/status" for p in tree)])
    )
    return lines.split() == ["TracerPid:", "0"] * 2


def assert_ended(vm: lab.LabVm, tree: tuple[int, int]) -> None:
    for pid in tree:
        assert subject.must(vm, f"test -d /proc/{pid} && cat /proc/{pid}/stat || true") == ""
    assert subject.must(vm, f"ls -d {OWN}/*/*/ || true").strip() == ""


def nothing_dies(vm: lab.LabVm, held: HeldTree) -> None:
    """The link broke, that is all."""


def criu_dies(vm: lab.LabVm, held: HeldTree) -> None:
    subject.must(vm, f"kill -9 {held.criu_pid}")


def agent_dies(vm: lab.LabVm, held: HeldTree) -> None:
    with vm.connect() as agent:
        pid = agent.hello.pid
        agent.spawn(["/bin/sh", "-c", f"sleep 1; kill -9 {pid}"])
    wait_for_another_agent(vm, pid)


def both_die(vm: lab.LabVm, held: HeldTree) -> None:
    criu_dies(vm, held)
    agent_dies(vm, held)


def wait_for_another_agent(vm: lab.LabVm, pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(ovr.OvrError), vm.connect() as agent:
            if agent.hello.pid != pid:
                return
        time.sleep(0.5)
    raise AssertionError("the agent was not started again")


Event = Callable[[lab.LabVm, HeldTree], None]
EVENTS = (nothing_dies, criu_dies, agent_dies, both_die)


@pytest.mark.parametrize("event", EVENTS if EVERYTHING else (nothing_dies, both_die))
def test_go(vm: lab.LabVm, tree: tuple[int, int], event: Event) -> None:
    move, held = to_doubt(vm, tree[0])
    event(vm, held)
    assert_frozen(vm, tree, move)
    with session(vm) as (agent, _):
        assert agent.doubts() == (move,)
        agent.adopt(move)
        assert bool(agent.end_dump()) == (event is nothing_dies)
        assert agent.doubts() == ()
    assert_ended(vm, tree)


@pytest.mark.parametrize("event", EVENTS)
def test_abort(vm: lab.LabVm, tree: tuple[int, int], event: Event) -> None:
    move, held = to_doubt(vm, tree[0])
    event(vm, held)
    assert_frozen(vm, tree, move)
    with session(vm) as (agent, _):
        agent.adopt(move)
        if event is both_die:
            with pytest.raises(AttemptFailed, match="may not run as before"):
                agent.abort()
        else:
            agent.abort()
        assert agent.doubts() == ()
    assert_as_before(vm, tree)


def test_the_way_back_is_shut(vm: lab.LabVm, tree: tuple[int, int]) -> None:
    """A controller keeps processes out of the parent: they run where they are."""
    move, _ = to_doubt(vm, tree[0])
    subject.must(vm, f"echo +pids > /sys/fs/cgroup/cgroup.subtree_control;"
                     f" echo +pids > {OWN}/cgroup.subtree_control")  # fmt: skip
    control = f"{OWN}/child/cgroup.subtree_control"
    subject.must(vm, f"echo +pids > {control}")
    with session(vm) as (agent, _):
        agent.adopt(move)
        with pytest.raises(AttemptFailed, match="may not run as before"):
            agent.abort()
        # It is decided.
        assert agent.doubts() == ()
        with pytest.raises(AttemptFailed, check=lambda error: error.code == Code.DOUBT):
            agent.adopt(move)
    assert subject.ask(vm).wrong == 0
    subject.must(
        vm,
        f"""
        set -e; echo -pids > {control}; echo {tree[1]} > {OWN}/child/cgroup.procs
        rmdir {OWN}/child/ovr-move-{move}; echo -pids > {OWN}/cgroup.subtree_control
    """,
    )
    assert_as_before(vm, tree)
