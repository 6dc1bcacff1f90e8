"""A VM that was held is let go, whatever happens to the holder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ovr.errors import CheckFailed, VmUnreachable
from ovr.vm.hold import Holder
from ovr.vm.qmp import Qmp
from tests.unit.qmp_server import QmpServer

# A process with several busy threads that answers QMP: as far as a hold goes, a QEMU.
BUSY = """
import sys, threading, time
from pathlib import Path
from tests.unit.qmp_server import QmpServer

def spin():
    while True:
        time.sleep(0)

QmpServer(Path(sys.argv[1]))
for _ in range(3):
    threading.Thread(target=spin, daemon=True).start()
print("ready", flush=True)
time.sleep(120)
"""


class Qemu:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, "-c", BUSY, str(path)], stdout=subprocess.PIPE
        )
        assert self.process.stdout.readline() == b"ready\n"

    def states(self) -> set[str]:
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        return {(t / "stat").read_text().rpartition(")")[2].split()[0] for t in threads}

    @property
    def stopped(self) -> bool:
        return self.states() == {"t"}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def qemu(tmp_path):
    qemu = Qemu(tmp_path / "qmp")
    yield qemu
    qemu.close()


def test_held_and_let_go(qemu):
    with Qmp.connect(qemu.path) as qmp, Holder(qmp, bound=60) as holder:
        for _ in range(20):
            with holder.held():
                assert qemu.stopped
            assert not {"t", "T"} & qemu.states()
        assert holder.count == 20
        assert 0 < holder.longest <= holder.seconds


def test_an_error_in_the_hold_lets_go(qemu):
    with Qmp.connect(qemu.path) as qmp, Holder(qmp) as holder:
        with pytest.raises(ZeroDivisionError), holder.held():
            raise ZeroDivisionError
        assert not {"t", "T"} & qemu.states()


def test_what_is_checked_in_every_hold(qemu):
    asked = []

    def check():
        assert qemu.stopped
        asked.append(len(asked))
        if len(asked) == 2:
            raise CheckFailed("not now")

    with Qmp.connect(qemu.path) as qmp, Holder(qmp, check, bound=60) as holder:
        with holder.held():
            assert asked == [0]
        with pytest.raises(CheckFailed, match="not now"), holder.held():
            pytest.fail("held what must not be written to")
        assert not {"t", "T"} & qemu.states()


def test_a_vm_that_somebody_else_paused_is_refused(tmp_path):
    server = QmpServer(tmp_path / "qmp")
    server.state = "paused"
    with Qmp.connect(server.path) as qmp, pytest.raises(CheckFailed, match="paused"):
        Holder(qmp)
    server.close()


def test_a_vm_that_has_ended(qemu):
    with Qmp.connect(qemu.path) as qmp, Holder(qmp) as holder:
        qemu.close()
        with pytest.raises(VmUnreachable), holder.held():
            pytest.fail("held a dead VM")


HOLD_FOREVER = """
import sys, time
from ovr.vm.hold import Holder
from ovr.vm.qmp import Qmp
with Qmp.connect(sys.argv[1]) as qmp, Holder(qmp, bound=60) as holder:
    with holder.held():
        if sys.argv[2] == "held":
            print("ready", flush=True)
            time.sleep(60)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("when", ["held", "free"])
def test_a_killed_holder_leaves_a_running_vm(qemu, when):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_FOREVER, str(qemu.path), when],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        assert qemu.stopped == (when == "held")
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while qemu.stopped and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not {"t", "T"} & qemu.states()
