"""Which VMs there are: from command lines to names, and the verdict on each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ovr import cli
from ovr.errors import RamNotShared, VmUnreachable
from ovr.memory.ram import Slot
from ovr.vm import census, find
from ovr.vm.find import find_vm
from ovr.vm.processes import QemuProcess, qemu_processes
from tests.unit.qmp_server import QmpServer

US = os.getpid()
"""Who listens at the monitors here."""


def process(line, pid=1, directory="/run", uid=None):
    words = tuple(f"qemu-system-x86_64 {line}".split())
    return QemuProcess(pid, words, Path(directory), os.geteuid() if uid is None else uid)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("-name web", "web"),
        ("--name guest=web,debug-threads=on", "web"),
        ("-name web,,1,process=x", "web,1"),
        ("-name process=x", None),
        ("", None),
    ],
)
def test_names(line, name):
    assert process(line).name == name


@pytest.mark.parametrize(
    ("line", "agent"),
    [
        ("-device vhost-vsock-pci,guest-cid=9", "vsock:9"),
        ('-device {"driver":"vhost-vsock-pci","guest-cid":9,"vhostfd":"3"}', "vsock:9"),
        ("-device vhost-vsock-pci", None),
        (
            "-chardev socket,id=c,path=a,server=on -device virtserialport,chardev=c,name=org.ovr.0",
            "serial:/run/a",
        ),
        ("-chardev socket,id=c,path=/a -device virtserialport,chardev=c,name=org.qemu", None),
        ("-chardev socket,id=c,fd=3 -device virtserialport,chardev=c,name=org.ovr.0", None),
        ("-device {broken", None),
    ],
)
def test_where_the_agent_would_be(line, agent):
    assert process(line).agent == agent


def test_processes_that_are_no_vms(tmp_path):
    script = "print(flush=True); import time; time.sleep(60)"

    def start(program, *arguments):
        command = [program, "-c", script, *arguments]
        started = subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE)
        started.stdout.read(1)
        return started

    started = [
        start("/usr/bin/qemu-system-x86_64", "-machine", "q35"),
        start("qemu-kvm"),
        start("qemu-system-x86_64", "-machine", "none,accel=kvm:tcg"),
        start("qemu-x86_64"),
        start("vim", "qemu-system-x86_64"),
    ]
    try:
        pids = {found.pid for found in qemu_processes()}
        assert [one.pid in pids for one in started] == [True, True, False, False, False]
    finally:
        for one in started:
            one.kill()
            one.communicate()


def test_by_name(monkeypatch, tmp_path):
    with_socket = process("-name a -qmp unix:q", 1, tmp_path)
    server = QmpServer(tmp_path / "q")
    twins = [process("-name twin", 2), process("-name twin", 3)]
    monkeypatch.setattr(find, "qemu_processes", lambda: [with_socket, *twins])
    assert find_vm("name:a").qmp == tmp_path / "q"
    with pytest.raises(VmUnreachable, match="no QEMU here"):
        find_vm("name:b")
    with pytest.raises(VmUnreachable, match="2 QEMUs") as caught:
        find_vm("name:twin")
    assert "pid:2, pid:3" in caught.value.hint
    server.close()


@pytest.fixture
def vms(monkeypatch, tmp_path):
    """Two VMs, one with shared RAM, and one without QMP; their servers."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    servers = [QmpServer(tmp_path / name / "q") for name in "ab"]
    found = [
        process("-name good -qmp unix:q -device vhost-vsock-pci,guest-cid=4", US, tmp_path / "a"),
        process("-name private -qmp unix:q", US, tmp_path / "b"),
        process("-name mute", 13),
    ]

    def slots(qmp):
        if "/a/" in qmp._name:
            return (Slot(0, 1 << 30, None, 0),)
        raise RamNotShared("the VM's RAM is private", "share it")

    monkeypatch.setattr(census, "qemu_processes", lambda: found)
    monkeypatch.setattr(census, "guest_slots", slots)
    monkeypatch.setattr(census, "lab_addresses", list)
    yield servers
    for server in servers:
        server.close()


def test_verdicts(vms, tmp_path):
    good, private, mute = census.found_vms()
    assert good == census.FoundVm(
        US, "good", ("name:good", f"qmp:{tmp_path}/a/q", f"pid:{US}"), "vsock:4", "running", 1 << 30
    )
    assert isinstance(private.problem, RamNotShared)
    assert private.state == "running"
    assert isinstance(mute.problem, VmUnreachable)
    assert "-qmp unix:" in mute.problem.hint
    vms[0].state = "paused"
    assert "paused" in str(census.found_vms()[0].problem)


def test_names_keep_off_the_terminal(vms, monkeypatch, capsys, tmp_path):
    evil = QemuProcess(14, ("qemu-system-x86_64", "-name", "\x1b[31mred\nline"), tmp_path, 0)
    monkeypatch.setattr(census, "qemu_processes", lambda: [evil])
    assert cli.main(["list", "-v"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 4


def test_the_command(vms, capsys):
    assert cli.main(["list"]) == 0
    head, good, private, mute, *problems = capsys.readouterr().out.splitlines()
    assert head.split() == ["VM", "PID", "MEMORY", "STATE", "AGENT", "AT", "USABLE"]
    assert good.split() == ["name:good", str(US), "1.0", "GiB", "running", "vsock:4", "yes"]
    assert (private.split()[-1], mute.split()[-1]) == ("no", "no")
    assert (
        problems[0] == "name:private cannot be restored into: the VM's RAM is private  → share it"
    )
    assert cli.main(["list", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "ovr.list/1"
    assert [vm["usable"] for vm in document["vms"]] == [True, False, False]
    assert document["vms"][1]["problem"]["kind"] == "RamNotShared"
