"""Where a VM listens, from its command line."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ovr.errors import LabError, UsageError, VmUnreachable
from ovr.vm import find
from ovr.vm.find import find_vm, lab_directory
from ovr.vm.processes import qmp_sockets


@pytest.mark.parametrize(
    ("line", "sockets"),
    [
        ("qemu -qmp unix:/run/a.qmp,server=on,wait=off", ["/run/a.qmp"]),
        ("qemu --qmp unix:/run/a.qmp,server,nowait", ["/run/a.qmp"]),
        ("qemu -qmp-pretty unix:/run/x,,y,server=on", ["/run/x,y"]),
        ("qemu -qmp tcp:127.0.0.1:4444,server=on", []),
        (
            "qemu -chardev socket,id=c0,path=/run/c0,server=on -mon chardev=c0,mode=control",
            ["/run/c0"],
        ),
        ("qemu -mon c0,mode=control -chardev socket,path=/run/c0,id=c0", ["/run/c0"]),
        ("qemu -chardev socket,id=c0,path=/run/c0 -mon chardev=c0,mode=readline", []),
        ("qemu -chardev socket,id=m,fd=31,server=on -mon chardev=m,id=monitor,mode=control", []),
        ("qemu -chardev socket,id=c0,path=/run/c0 -device virtserialport,chardev=c0", []),
        (
            "qemu -chardev socket,id=c0,path=/a -mon chardev=c0,mode=control -qmp unix:/b",
            ["/b", "/a"],
        ),
        ("qemu -qmp", []),
        ("", []),
    ],
)
def test_qmp_sockets(line, sockets):
    assert list(qmp_sockets(line.split())) == sockets


@pytest.mark.parametrize(
    "spec", ["", "qmp", "qmp:", "pid:", "pid:x", "pid:-1", "pid:²", "lab:", "vm:1"]
)
def test_not_a_vm(spec):
    with pytest.raises(UsageError) as caught:
        find_vm(spec)
    assert caught.value.exit_code == 2
    assert "lab:NAME" in caught.value.hint


def test_qmp_path():
    assert find_vm("qmp:/run/a:b") == find.VmAddress("qmp:/run/a:b", Path("/run/a:b"), None)


def as_process(tmp_path, *arguments):
    """A process that has QEMU's command line, but is not QEMU."""
    script = "import time; time.sleep(60)"
    command = ["qemu-system-x86_64", "-c", script, *arguments]
    return subprocess.Popen(command, executable=sys.executable, cwd=tmp_path)


def found(pid):
    deadline = time.monotonic() + 5
    while True:  # until it has called exec
        try:
            return find_vm(f"pid:{pid}")
        except VmUnreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def test_pid(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "two"))
        with as_process(tmp_path, "-qmp", "unix:one", "-qmp", "unix:two,server=on") as process:
            assert found(process.pid).qmp == tmp_path / "two"  # relative to QEMU's directory
            process.kill()


def test_pid_without_a_usable_socket(tmp_path):
    with as_process(tmp_path, "-mon", "chardev=charmonitor,mode=control") as process:
        time.sleep(0.3)
        with pytest.raises(VmUnreachable, match="no QMP socket") as caught:
            find_vm(f"pid:{process.pid}")
        assert "-qmp unix:" in caught.value.hint
        process.kill()


def test_pid_of_nobody_and_of_somebody_else():
    with pytest.raises(VmUnreachable, match="no process"):
        find_vm(f"pid:{2**22 + 1}")
    with pytest.raises(VmUnreachable, match="no process"):
        find_vm("pid:" + "9" * 40)
    with pytest.raises(VmUnreachable, match="is not QEMU"):
        find_vm(f"pid:{os.getpid()}")


def test_runtime_directories(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert lab_directory("a") == tmp_path / "ovr" / "lab" / "a"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(find.os, "geteuid", lambda: 0)
    assert lab_directory() == Path("/run/ovr/lab")


def test_a_directory_in_tmp_that_is_not_ours(monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    other = os.geteuid() + 54321
    monkeypatch.setattr(find.os, "geteuid", lambda: other)
    place = Path(f"/tmp/ovr-{other}")
    try:
        with pytest.raises(LabError, match="belongs to user "):
            lab_directory("a")
    finally:
        place.rmdir()
