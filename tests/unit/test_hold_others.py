"""Other processes can neither end nor prolong a hold, whatever they do to QEMU or its holder."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ovr.errors import CheckFailed, HoldBroken
from ovr.memory.ram import GuestRam
from ovr.vm.hold import Holder
from tests.unit.machine_process import Monitor, RunningMachine, eventually, run_script


@pytest.fixture
def machine(tmp_path):
    machine = RunningMachine(tmp_path)
    yield machine
    machine.close()


def holder(machine, **options):
    # We look around in holds, on a host that may be busy.
    return Holder(Monitor(machine.pid), bound=60, **options)


def assert_still(machine, seconds=0.02):
    before = machine.counters
    time.sleep(seconds)
    assert machine.counters == before


def test_sigcont_of_another_process(machine):
    with holder(machine) as held:
        assert held.way == "ptrace"
        for _ in range(20):
            with held.held():
                os.kill(machine.pid, signal.SIGCONT)
                assert_still(machine)
        assert machine.runs


# As tmux does, and screen: whatever stops is told to go on.
RESTLESS = """
import os, signal, subprocess, sys
child = subprocess.Popen(sys.argv[1:])
while True:
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        break
    print("stopped", flush=True)
    os.kill(child.pid, signal.SIGCONT)
"""


def test_a_parent_that_lets_it_run(tmp_path):
    machine = RunningMachine(tmp_path, parent=RESTLESS)
    try:
        with holder(machine) as held:
            for _ in range(20):
                with held.held():
                    assert_still(machine)
        assert machine.runs
        told = select.select([machine.process.stdout], [], [], 0)[0]
        assert not told, "the parent was told of a stop"
    finally:
        machine.close()


def test_threads_come_and_go(tmp_path):
    machine = RunningMachine(tmp_path, "churn", threads=3)
    try:
        with holder(machine) as held:
            for _ in range(300):
                with held.held():
                    assert_still(machine, 0.001)
            assert machine.runs
    finally:
        machine.close()


def test_no_signal_is_lost(machine):
    """Queued ones, to the process and to its threads, while it is stopped and about to be."""
    sent = 0
    with holder(machine) as held:
        for _ in range(50):
            for _ in range(3):
                os.kill(machine.pid, signal.SIGRTMIN)
            with held.held():
                os.kill(machine.pid, signal.SIGRTMIN)
            sent += 4
        assert eventually(lambda: machine.signals == sent)


def test_no_signal_is_lost_when_the_tracer_dies(machine):
    sent = 0
    with holder(machine) as held:
        for _ in range(20):
            for _ in range(5):
                os.kill(machine.pid, signal.SIGRTMIN)
            sent += 5
            with pytest.raises(HoldBroken), held.held():
                os.kill(held.tracer, signal.SIGKILL)
        assert eventually(lambda: machine.signals == sent), (machine.signals, sent)


def test_a_stop_by_others_stays(machine):
    """A QEMU that another process has stopped is still stopped after a hold."""
    os.kill(machine.pid, signal.SIGSTOP)
    assert eventually(lambda: machine.states() == {"T"})
    with holder(machine) as held:
        for _ in range(3):
            with held.held():
                pass
    assert eventually(lambda: machine.states() == {"T"})
    assert_still(machine)
    os.kill(machine.pid, signal.SIGCONT)
    assert machine.runs


def test_the_tracer_is_killed_in_a_hold(machine):
    with GuestRam([machine.slot], writable=True) as ram, holder(machine, ram=ram) as held:
        with pytest.raises(HoldBroken, match="that holds the VM was killed") as caught, held.held():
            ram.write(2 << 20, b"held")
            os.kill(held.tracer, signal.SIGKILL)
            assert machine.runs
            with pytest.raises(HoldBroken):
                ram.write(2 << 20, b"runs")
        assert "restore again" in caught.value.hint
        assert ram.read(2 << 20, 4) == b"held"
        with held.held():  # what has been written must be taken back
            assert_still(machine)
            ram.write(2 << 20, b"undo")
        assert ram.read(2 << 20, 4) == b"undo"


def test_the_tracer_is_killed_between_holds(machine):
    with holder(machine) as held:
        os.kill(held.tracer, signal.SIGKILL)
        with held.held():
            assert_still(machine)
        assert machine.runs


HOLD_ON = """
hold.BOUND_SECONDS = 60.0
with Holder(Monitor(pid)) as holder, holder.held():
    print(holder.tracer, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("victims", ["ovr", "ovr and tracer", "tracer and ovr"])
def test_killed_in_a_hold(machine, victims):
    process = run_script(HOLD_ON, machine.pid)
    tracer = int(process.stdout.readline())
    assert_still(machine)
    pids = {"ovr": process.pid, "tracer": tracer}
    for name in victims.split(" and "):
        os.kill(pids[name], signal.SIGKILL)
    process.communicate()
    assert machine.runs
    assert eventually(lambda: not Path(f"/proc/{tracer}").exists())


def test_all_of_a_cgroup_is_killed(machine):
    """cgroup.kill, as memory.oom.group does it."""
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    root = next((Path(at) for _, at, kind, *_ in mounts if kind == "cgroup2"), Path("/nowhere"))
    group = root / f"ovr-test-hold-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cgroup.kill").stat()
    except OSError:
        pytest.skip("no cgroup v2 that can be written to")
    try:
        process = run_script(HOLD_ON, machine.pid)
        tracer = int(process.stdout.readline())
        for pid in (process.pid, tracer):
            (group / "cgroup.procs").write_text(str(pid))
        (group / "cgroup.kill").write_text("1")
        process.communicate()
        assert machine.runs
    finally:
        eventually(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


DEBUGGER = """
import ctypes, sys, time
PTRACE_SEIZE = 0x4206
if ctypes.CDLL(None).ptrace(PTRACE_SEIZE, int(sys.argv[1]), 0, 0):
    sys.exit(1)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def debugger(machine):
    """Starts one that traces a thread."""
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", DEBUGGER, str(machine.pid)], stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_debugger_is_refused(machine, debugger):
    pid = debugger().pid
    with pytest.raises(CheckFailed, match=rf"is traced by process {pid} \(python"):
        holder(machine)
    assert machine.runs


def test_a_debugger_between_holds(machine, debugger):
    """Between holds QEMU is not traced: a debugger can attach, and is found at the next hold."""
    with holder(machine) as held:
        with held.held():
            pass
        process = debugger()
        with pytest.raises(CheckFailed, match="is traced by"), held.held():
            pytest.fail("held what another traces")
        assert machine.runs
        process.kill()
        process.wait()
        with held.held():
            assert_still(machine)


def test_killed_while_it_is_held(machine):
    """A QEMU that is killed in a hold ends, and its parent is told."""
    with holder(machine) as held, held.held():
        os.kill(machine.pid, signal.SIGKILL)
    assert machine.process.wait(10) == -signal.SIGKILL


def test_the_tracer_is_nobodys_child_to_wait_for(machine):
    """A host program that waits for its children does not get ours."""
    with holder(machine) as held:
        assert held.tracer
        with pytest.raises(ChildProcessError):
            os.waitid(os.P_PID, held.tracer, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    assert held.tracer == 0
