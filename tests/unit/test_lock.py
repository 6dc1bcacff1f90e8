"""Two restores into one VM at once: the second is told who has it."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ovr.errors import CheckFailed
from ovr.memory.addresses import Gpa, Offset
from ovr.memory.ram import Slot
from ovr.vm.lock import locked
from ovr.vm.qmp import Qmp
from tests.unit.machine import ram_file

CLAIM_FOREVER = """
import os, sys, time
from ovr.memory.addresses import Gpa, Offset
from ovr.memory.ram import RamFile, Slot
from ovr.vm.lock import locked
file = RamFile(os.open(sys.argv[1], os.O_RDWR), sys.argv[1])
with locked([Slot(Gpa(0), 4096, file, Offset(0))]):
    print("ready", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def slots(tmp_path) -> list[Slot]:
    for name in ("low", "high"):
        (tmp_path / name).write_bytes(bytes(4096))
    return [
        Slot(Gpa(1 << 32), 4096, ram_file(tmp_path / "high"), Offset(0)),
        Slot(Gpa(0), 4096, ram_file(tmp_path / "low"), Offset(0)),
    ]


@pytest.fixture
def other(slots):
    with subprocess.Popen(
        [sys.executable, "-c", CLAIM_FOREVER, slots[1].file.name], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_the_second_is_told_who_has_it(slots, other):
    with pytest.raises(CheckFailed, match=f"process {other.pid}$") as caught, locked(slots):
        pytest.fail("two at once")
    assert f"ps -p {other.pid}" in caught.value.hint
    assert caught.value.exit_code == 4


def test_it_ends_with_the_process(slots, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    with locked(slots), pytest.raises(CheckFailed, match=str(os.getpid())), locked(slots):
        pytest.fail("two at once")
    with locked(slots):
        pass


def test_another_name_is_the_same_vm(slots, other, tmp_path):
    """As from another container: the file is the lock, not its name."""
    alias = tmp_path / "alias"
    alias.hardlink_to(slots[1].file.name)
    with (
        pytest.raises(CheckFailed, match=str(other.pid)),
        locked([Slot(Gpa(0), 4096, ram_file(alias), Offset(0))]),
    ):
        pytest.fail("two at once")


def test_a_file_system_without_locks(slots, monkeypatch):
    def flock(fd, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(CheckFailed, match="cannot be locked") as caught, locked(slots):
        pytest.fail("not locked")
    assert "tmpfs" in caught.value.hint


def test_a_name_that_leads_to_another_file(slots, other):
    """The RAM file is what is open, whatever has its name by now."""
    name = Path(slots[1].file.name)
    name.unlink()
    name.write_bytes(bytes(4096))
    with pytest.raises(CheckFailed, match=str(other.pid)), locked(slots):
        pytest.fail("two at once")


def test_a_monitor_that_the_other_one_has(slots, other, tmp_path):
    """QEMU serves one client of a monitor: here we are QEMU, and greet nobody."""
    with (
        socket.socket(socket.AF_UNIX) as listener,
        Path(slots[1].file.name).open("rb"),
        pytest.raises(CheckFailed, match=f"process {other.pid}$"),
    ):
        listener.bind(str(tmp_path / "qmp"))
        listener.listen()
        Qmp.connect(tmp_path / "qmp", timeout=0.2)
