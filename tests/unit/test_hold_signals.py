"""Signals to us at any moment of a hold: it ends as it should, and they have their effect."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.unit.machine_process import RunningMachine, eventually, run_script


@pytest.fixture
def machine(tmp_path):
    machine = RunningMachine(tmp_path, "idle")
    yield machine
    machine.close()


# An exception at random bytecodes around a hold: SIGALRM, since a process can send that to itself.
STORM = """
import random

class Interrupted(BaseException):
    pass

def interrupt(number, frame):
    if armed:
        raise Interrupted

def state():
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(") ")[2][0]

armed = False
signal.signal(signal.SIGALRM, interrupt)
left = hits = 0
with Holder(Monitor(pid)) as holder:
    for _ in range(int(sys.argv[2])):
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.randrange(1, 900) * 1e-6)
            with holder.held():
                pass
            until = time.perf_counter() + 0.001
            while time.perf_counter() < until:
                pass
            armed = False
        except Interrupted:
            armed = False
            hits += 1
            left += state() in "tT"
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.kill(pid, signal.SIGCONT)
print(hits, left)
"""


def test_a_storm_of_interrupts(machine):
    process = run_script(STORM, machine.pid, 4000)
    out, errors = process.communicate(timeout=300)
    assert not errors
    hits, left = map(int, out.split())
    assert hits > 1000
    assert left == 0


# One that comes in a hold is raised when it has ended, with all handlers as they were.
IN_A_HOLD = """
class Ended(BaseException):
    pass

def end(number, frame):
    raise Ended(signal.Signals(number).name)

numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
for number in numbers:
    signal.signal(number, end)
before = [signal.getsignal(number) for number in signal.valid_signals()]
with Holder(Monitor(pid)) as holder:
    for number in numbers:
        reached = ""
        try:
            with holder.held():
                signal.raise_signal(number)
                reached = "end of the hold"
        except Ended as error:
            print(error, reached)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
print(signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN)
signal.signal(signal.SIGUSR1, end)
print(before == [signal.getsignal(number) for number in signal.valid_signals()])
"""


def test_what_comes_in_a_hold_comes_after_it(machine):
    process = run_script(IN_A_HOLD, machine.pid)
    out, errors = process.communicate(timeout=60)
    assert not errors
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    assert out.splitlines() == [*(f"{name} end of the hold" for name in names), "True", "True"]


HOLDS = """
hold.BOUND_SECONDS = 60
print("ready", flush=True)
with Holder(Monitor(pid)) as holder:
    while True:
        with holder.held():
            time.sleep(0.01)
        time.sleep(0.001)
"""


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def test_ctrl_z(machine):
    """It stops between two holds: the VM runs while it is stopped."""
    # A process group of its own in our session: the default action of SIGTSTP counts.
    process = run_script(HOLDS, machine.pid, process_group=0)
    assert process.stdout.readline() == "ready\n"
    try:
        for number in range(20):
            time.sleep(0.02 + number * 0.0007)
            os.kill(process.pid, signal.SIGTSTP)
            assert eventually(lambda: state_of(process.pid) == "T")
            looks = {
                state for _ in range(20) for state in machine.states() if not time.sleep(0.002)
            }
            assert not looks & {"t", "T"}
            os.kill(process.pid, signal.SIGCONT)
            assert eventually(lambda: state_of(process.pid) != "T")
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


IN_A_THREAD = """
import threading

def work():
    with Holder(Monitor(pid)) as holder:
        for _ in range(50):
            with holder.held():
                pass
    print(holder.count)

before = [signal.getsignal(number) for number in signal.valid_signals()]
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(before == [signal.getsignal(number) for number in signal.valid_signals()])
"""


def test_in_another_thread(machine):
    process = run_script(IN_A_THREAD, machine.pid)
    out, errors = process.communicate(timeout=60)
    assert (out, errors) == ("50\nTrue\n", "")
