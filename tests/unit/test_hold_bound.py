"""A hold that lasts too long is broken off, whatever keeps us; nothing of it counts."""

import os
import signal
import time

import pytest

from ovr.errors import HoldBroken
from ovr.memory.ram import GuestRam
from ovr.vm.hold import Holder
from tests.unit.machine_process import Monitor, RunningMachine, eventually, run_script


@pytest.fixture
def machine(tmp_path):
    machine = RunningMachine(tmp_path)
    yield machine
    machine.close()


def test_broken_off(machine):
    with (
        GuestRam([machine.slot], writable=True) as ram,
        Holder(Monitor(machine.pid), ram=ram) as holder,
    ):
        with pytest.raises(HoldBroken, match=r"held for longer than 0.2 s; broken off"):  # noqa: SIM117
            with holder.held():
                ram.write(2 << 20, b"held")
                assert machine.runs
                with pytest.raises(HoldBroken):
                    ram.write(2 << 20, b"runs")
        assert ram.read(2 << 20, 4) == b"held"
        with holder.held():
            ram.write(2 << 20, b"next")
        assert ram.read(2 << 20, 4) == b"next"


def test_an_error_in_a_broken_hold(machine):
    """The first cause is that the VM ran: what was found then makes no sense."""
    with (
        Holder(Monitor(machine.pid), bound=0.05) as holder,
        pytest.raises(HoldBroken) as caught,
        holder.held(),
    ):
        assert machine.runs
        raise ZeroDivisionError
    assert isinstance(caught.value.__context__, ZeroDivisionError)


def test_writes_need_a_hold(machine):
    with GuestRam([machine.slot], writable=True) as ram:
        with pytest.raises(PermissionError, match="only while the VM is held"):
            ram.write(2 << 20, b"free")
        with Holder(Monitor(machine.pid), ram=ram) as holder:
            with pytest.raises(PermissionError, match="only while the VM is held"):
                ram.write(2 << 20, b"free")
            with holder.held():
                ram.write(2 << 20, b"held")
            with pytest.raises(PermissionError, match="only while the VM is held"):
                ram.write(2 << 20, b"free")
        with pytest.raises(PermissionError, match="only while the VM is held"):
            ram.write(2 << 20, b"free")
        assert ram.read(2 << 20, 4) == b"held"


STOPPED = """
with Holder(Monitor(pid)) as holder:
    try:
        with holder.held():
            print("held", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
    except OvrError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


def test_stopped_in_a_hold(machine):
    """SIGSTOP, a debugger, a frozen cgroup: we do not even know."""
    process = run_script(STOPPED, machine.pid)
    assert process.stdout.readline() == "held\n"
    assert machine.runs
    assert process.poll() is None
    os.kill(process.pid, signal.SIGCONT)
    assert process.stdout.readline().startswith("HoldBroken: the VM was held for longer")
    assert process.wait(10) == 0
    process.communicate()


WRITING = """
import numpy as np
from ovr._fastcopy import RUN
from ovr.memory.addresses import Gpa, Offset
from ovr.memory.ram import Slot
from tests.unit.machine import ram_file

size = 4 << 20
runs = np.array([(0, 1 << 20, 2 << 20, 0, 0, 12)] * 200, dtype=RUN)
source = os.memfd_create("source")
os.truncate(source, 2 << 20)
ram = GuestRam([Slot(Gpa(0), size, ram_file(sys.argv[2]), Offset(0))], writable=True)
with Holder(Monitor(pid), ram=ram) as holder, holder.held():
    print("held", flush=True)
    while True:
        ram.copy_in(runs, source, 0, 2 << 20)
"""


TRIES = 50  # it writes nearly all the time


def test_stopped_in_a_write(machine):
    """It may write at any later time: it is killed, and then the VM runs."""
    for _ in range(TRIES):
        process = run_script(WRITING, machine.pid, machine.path)
        assert process.stdout.readline() == "held\n"
        os.kill(process.pid, signal.SIGSTOP)
        assert eventually(lambda: machine.runs)
        stopped_in_a_write = process.poll() is not None
        process.kill()
        _, errors = process.communicate()
        if stopped_in_a_write:
            assert process.returncode == -signal.SIGKILL
            assert "did not end a hold of the VM in time, and was killed" in errors
            return
    pytest.fail("it was never stopped in a write")


def test_honest_copying_ends_in_time(machine):
    """More than a hold has time for: the copy ends early, and says how far it came."""
    import numpy as np  # noqa: PLC0415

    from ovr._fastcopy import RUN  # noqa: PLC0415
    from tests.sources import as_file  # noqa: PLC0415

    runs = np.array([(0, 1 << 20, 2 << 20, 0, 0, 12)] * 20000, dtype=RUN)
    with (
        GuestRam([machine.slot], writable=True) as ram,
        Holder(Monitor(machine.pid), ram=ram, bound=4.0) as holder,
        holder.held(),
    ):
        started = time.monotonic()
        done = ram.copy_in(runs, *as_file(bytes(2 << 20)))
        assert 0 < done < 20000 * (2 << 20)
        assert time.monotonic() - started >= 1.0
