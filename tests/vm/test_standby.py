"""A process of the host that stands by, from `ovr warm` to the VM's end; see `ovr.standby`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ovr import lab
from ovr.lab import demo
from ovr.standby.place import _directory_path
from tests.vm.conftest import EVERYTHING, PREFIX, alive, end_workload, whole

NOTE = "restore: done by the standby process\n"


@dataclass(frozen=True)
class Host:
    """A mount namespace: whoever stands by is found by those in it only, not by other tests.

    Args:
        pid: of a process in it.
        vm: where all commands go.
    """

    pid: int
    vm: lab.LabVm

    def start(self, *words: str | Path, **options) -> subprocess.Popen:
        command = [sys.executable, "-m", "ovr", *words, "--vm", f"lab:{self.vm.name}"]
        # Where the tests run in the background of a script SIGINT is ignored, and would stay so.
        heeding = ["env", "--default-signal=INT"]
        back = ["env", f"--chdir={options.pop('cwd', Path.cwd())}"]  # nsenter leaves it
        entered = [*heeding, "nsenter", "-t", str(self.pid), "-m", *back, *map(str, command)]
        return subprocess.Popen(
            entered, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )

    def run(self, *words: str | Path, code: int = 0, **options) -> tuple[str, str]:
        with self.start(*words, **options) as process:
            output, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        return output, errors

    def standing_by(self) -> Sequence[str]:
        found = subprocess.run(
            ["pgrep", "-f", "--", f"-m ovr.cli.standby .*{self.qemu}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return found.stdout.split()

    @property
    def qemu(self) -> int:
        return self.vm.processes["qemu"].pid

    def ended(self) -> bool:
        limit = time.monotonic() + 30
        while self.standing_by() and time.monotonic() < limit:
            time.sleep(0.05)
        return not self.standing_by()


@contextmanager
def host_of(vm: lab.LabVm) -> Iterator[Host]:
    place = _directory_path()
    # As root, who meets in one directory.
    hide = f"mkdir -p {place} && mount -t tmpfs -o mode=0700 own {place}"
    command = ["unshare", "-m", "sh", "-c", f"{hide} && echo ready && exec sleep 900"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        try:
            yield Host(process.pid, vm)
        finally:
            process.kill()


@pytest.fixture
def suite() -> str:
    return "trixie"


@pytest.fixture
def host(vm) -> Iterator[Host]:
    with host_of(vm) as found:
        yield found
        found.run("warm", "--off")


def test_a_warm_restore_is_done_by_who_stands_by(host, vm, dump, tmp_path):
    host.run("warm", "-D", dump.path)
    [server] = host.standing_by()
    (tmp_path / "log").mkdir()
    options = ["-v", "--json", "-W", "log", "--pidfile", "pid", "--display-stats"]
    output, errors = host.run("restore", "-D", dump.path, *options, cwd=tmp_path)
    report = json.loads(output)
    assert (report["skeleton"], report["skeleton_why"]) == ("warm", "")
    assert NOTE in errors
    assert (tmp_path / "log" / "pid").read_text() == str(dump.pid)  # where the client was
    whole(vm, dump)
    end_workload(vm)
    # The next one, too; it finds no pool.
    output, errors = host.run("restore", "-D", dump.path, "-v", "--json")
    assert json.loads(output)["skeleton"] == "cold"
    assert NOTE in errors
    whole(vm, dump)
    assert host.standing_by() == [server]
    [socket] = Path(f"/proc/{host.pid}/root{_directory_path()}").iterdir()
    assert socket.is_socket()
    host.run("warm", "--off")
    assert host.ended()
    assert list(socket.parent.iterdir()) == []


def test_nobody_is_to_stand_by(host, vm, dump):
    host.run("warm", "-D", dump.path)
    assert host.standing_by()
    host.run("warm", "-D", dump.path, "--no-standby")
    assert host.ended()
    output, errors = host.run("restore", "-D", dump.path, "-v", "--json")
    assert json.loads(output)["skeleton"] == "warm"
    assert "standby process" not in errors
    whole(vm, dump)


def test_without_a_pool(host, vm, dump):
    output, _ = host.run("warm", "--standby")
    assert output.startswith("no pool: ")
    assert host.standing_by()
    output, errors = host.run("restore", "-D", dump.path, "-v", "--json")
    assert json.loads(output)["skeleton"] == "cold"
    assert NOTE in errors
    whole(vm, dump)


ENDS = [(signal.SIGKILL, -9), (signal.SIGINT, 130)]
if EVERYTHING:
    ENDS += [(signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "code"), ENDS)
def test_a_restore_that_is_ended(host, vm, dump, number, code):
    """As by a command that does it itself: the tree is gone, and the VM takes the next."""
    host.run("warm", "-D", dump.path)
    [server] = host.standing_by()
    with host.start("restore", "-D", dump.path, "--progress", "json", "-v") as process:
        for line in process.stderr:
            if '"skeleton"' in line:
                break
        os.kill(host.qemu, signal.SIGSTOP)  # or it might be done before it hears of it
        process.send_signal(number)
        time.sleep(0.5)
        os.kill(host.qemu, signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    limit = time.monotonic() + 30
    while alive(vm, dump.pid) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not alive(vm, dump.pid)
    assert host.standing_by() == [server]
    _, errors = host.run("restore", "-D", dump.path, "-v")
    assert NOTE in errors
    whole(vm, dump)


def test_it_ends_with_its_vm():
    with demo.lab_vm(f"{PREFIX}standby", memory="512M") as vm, host_of(vm) as host:
        host.run("warm", "--size", "16M")
        assert len(host.standing_by()) == 1
        vm.down()
        assert host.ended()
