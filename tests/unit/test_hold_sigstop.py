"""Where QEMU may not be traced it is stopped by SIGSTOP, and nothing counts if that was undone."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.machine_process import RunningMachine, eventually, run_script

# Root may trace everything, unless it lacks this; others may not trace what is not dumpable.
UNPRIVILEGED = (
    ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace") if os.geteuid() == 0 else ()
)


@pytest.fixture
def machine(tmp_path):
    machine = RunningMachine(tmp_path, "undumpable")
    yield machine
    machine.close()


def start(script, machine, *arguments):
    return run_script(script, machine.pid, machine.path, *arguments, prefix=UNPRIVILEGED)


HOLDS = """
import mmap
ram = mmap.mmap(os.open(sys.argv[2], os.O_RDONLY), 8192, access=mmap.ACCESS_READ)
moved = 0
hold.BOUND_SECONDS = 60
with Holder(Monitor(pid)) as holder:
    for _ in range(30):
        with holder.held():
            before = ram[:]
            time.sleep(0.01)
            moved += ram[:] != before
print(holder.as_json()["by"], moved)
"""


def test_held(machine):
    process = start(HOLDS, machine)
    out, errors = process.communicate(timeout=60)
    assert (out, errors) == ("sigstop 0\n", "")
    assert machine.runs


INTERFERED = """
hold.BOUND_SECONDS = 60
with Holder(Monitor(pid)) as holder:
    for _ in range(int(sys.argv[3])):
        try:
            with holder.held():
                os.kill(pid, signal.SIGCONT)
                time.sleep(float(sys.argv[4]))
                if sys.argv[5] == "again":
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(0.02)
        except OvrError as error:
            print(f"{type(error).__name__}: {error}: {error.hint}")
        else:
            print("counted")
"""


@pytest.mark.parametrize("then", ["runs", "again"])
def test_sigcont_of_another_process(machine, then):
    """Also if it is stopped again by the end: it has run."""
    process = start(INTERFERED, machine, 5, 0.01, then)
    out, errors = process.communicate(timeout=60)
    assert not errors
    lines = out.splitlines()
    assert len(lines) == 5
    assert all(
        line.startswith("HoldBroken: ")
        and "was resumed by another process while it was held" in line
        for line in lines
    ), lines
    assert machine.runs


ONCE = """
try:
    Holder(Monitor(pid))
except OvrError as error:
    print(f"{type(error).__name__}: {error}: {error.hint}")
else:
    print("held")
"""


def test_a_terminal_is_refused(tmp_path):
    """Its shell would see it stop, and put it into the background."""
    leader, follower = pty.openpty()
    machine = RunningMachine(tmp_path, "undumpable", terminal=follower)
    try:
        process = start(ONCE, machine)
        out, errors = process.communicate(timeout=60)
        assert not errors
        assert out.startswith("CheckFailed: ")
        assert "has a terminal" in out and "setsid" in out
        assert not {"T", "t"} & machine.states()
    finally:
        machine.close()
        os.close(leader)
        os.close(follower)


KILLED = """
hold.BOUND_SECONDS = 60
with Holder(Monitor(pid)) as holder:
    for _ in range(2):
        try:
            with holder.held():
                os.kill(holder.tracer, signal.SIGKILL)
        except OvrError as error:
            print(f"{type(error).__name__}: {error}")
"""


def test_the_tracer_is_killed(machine):
    """The kernel does nothing for us here: we do."""
    process = start(KILLED, machine)
    out, errors = process.communicate(timeout=60)
    assert not errors
    assert out.splitlines() == ["HoldBroken: the process that holds the VM was killed"] * 2
    assert machine.runs


HOLD_ON = """
with Holder(Monitor(pid)) as holder, holder.held():
    print(holder.tracer, flush=True)
    time.sleep(60)
"""


def test_killed_in_a_hold(machine):
    process = start(HOLD_ON.replace("with", "hold.BOUND_SECONDS = 60\nwith", 1), machine)
    tracer = int(process.stdout.readline())
    assert machine.states() == {"T"}
    process.kill()
    process.communicate()
    assert machine.runs
    assert eventually(lambda: not Path(f"/proc/{tracer}").exists())


def test_broken_off(machine):
    # Long enough for a loaded machine to come to the print, and far shorter than the sleep.
    process = start(HOLD_ON.replace("with", "hold.BOUND_SECONDS = 3\nwith", 1), machine)
    assert process.stdout.readline()
    assert eventually(lambda: machine.runs)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_neither_traced_nor_signalled():
    """Another user's: nobody is stopped."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    script = "os.setresuid(65534, 65534, 65534)\n" + ONCE
    try:
        process = run_script(script, other.pid)
        out, errors = process.communicate(timeout=60)
        assert not errors
        assert out.startswith("CheckFailed: ") and "neither traced nor signalled" in out
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
