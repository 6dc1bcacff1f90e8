"""VMs under libvirt, with a virsh that a test wrote."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ovr.errors import VmUnreachable
from ovr.vm.find import find_vm
from ovr.vm.libvirt import Domain, LibvirtMonitor
from ovr.vm.processes import qemu_process
from ovr.vm.qmp import ExecuteError

UUID = "5a0f7d0e-8f9e-4a31-9b44-0c2a51f2c0de"

XML = f"""<domain type='kvm' id='7'>
  <name>web</name><uuid>{UUID}</uuid>
  <devices>
    <channel type='unix'><source mode='bind' path='/run/ga'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='unix'><source mode='bind' path='/run/web.ovr'/>
      <target type='virtio' name='org.ovr.0'/></channel>
    {{vsock}}
  </devices>
</domain>"""
VSOCK = "<vsock model='virtio'><cid auto='yes' address='5'/></vsock>"


@pytest.fixture
def virsh(tmp_path, monkeypatch):
    """Install a virsh that prints `out` and `err`, and exits with `code`; it logs its words."""
    path = tmp_path / "bin" / "virsh"
    path.parent.mkdir()
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    def install(out="", err="", code=0, wait=0):
        (tmp_path / "out").write_text(out)
        (tmp_path / "err").write_text(err)
        path.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\nsleep {wait}\n'
            f"cat {tmp_path}/out\ncat {tmp_path}/err >&2\nexit {code}\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return tmp_path / "words"

    return install


@pytest.fixture
def qemu(tmp_path):
    """A process with the command line of a QEMU that libvirt started."""
    arguments = ["-name", "guest=web,debug-threads=on", "-uuid", UUID,
                 "-chardev", "socket,id=charmonitor,fd=28,server=on"]  # fmt: skip
    command = ["qemu-system-x86_64", "-c", "import time; time.sleep(60)", *arguments]
    with subprocess.Popen(command, executable=sys.executable, cwd=tmp_path) as process:
        while UUID not in Path(f"/proc/{process.pid}/cmdline").read_text():
            time.sleep(0.01)
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("vsock", "agent"),
    [(VSOCK, "vsock:5"), ("", "serial:/run/web.ovr"), ("<vsock/>", "serial:/run/web.ovr")],
)
def test_a_domain_and_its_agent(virsh, vsock, agent):
    words = virsh(XML.format(vsock=vsock))
    address = find_vm("libvirt:web")
    assert address.qmp == Domain("web", UUID, agent)
    assert address.agent == agent
    assert words.read_text().split() == ["--quiet", "dumpxml", "--domain", "web"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"err": "error: failed to get domain 'web'\n", "code": 1}, "failed to get domain"),
        (
            {"err": "error: failed to connect to the hypervisor\nerror: no socket\n", "code": 1},
            "cannot be reached: no socket",
        ),
        ({"code": 3}, "exits with 3"),
        ({"out": "<domain"}, "is invalid"),
        ({"out": XML.format(vsock="").replace(" id='7'", "")}, "does not run"),
        ({"out": XML.format(vsock="").replace("'kvm'", "'lxc'")}, "is no QEMU"),
    ],
)
def test_domains_that_are_of_no_use(virsh, answer, words):
    virsh(**answer)
    with pytest.raises(VmUnreachable, match=words):
        find_vm("libvirt:web")


@pytest.mark.parametrize(
    ("label", "uid"),
    [("+64055:+64055", 64055), ("+0:+0", 0), ("root:root", 0), (None, None)],
)
def test_the_user_that_a_domain_runs_as(virsh, label, uid):
    seclabel = f"<seclabel model='dac'><label>{label}</label></seclabel>" if label else ""
    other = "<seclabel model='apparmor'><label>libvirt-1</label></seclabel>"
    virsh(XML.format(vsock="").replace("</domain>", f"{other}{seclabel}</domain>"))
    assert find_vm("libvirt:web").qmp.uid == uid


def test_a_user_that_nobody_knows(virsh):
    seclabel = "<seclabel model='dac'><label>no-such-user:x</label></seclabel>"
    virsh(XML.format(vsock="").replace("</domain>", f"{seclabel}</domain>"))
    with pytest.raises(VmUnreachable, match="no-such-user"):
        find_vm("libvirt:web")


def test_xml_that_is_nested_deeply(virsh):
    virsh("<domain type='kvm' id='7'>" + "<a>" * 100_000 + "</a>" * 100_000 + "</domain>")
    assert find_vm("libvirt:web").agent is None
    virsh("<domain>" + "<a>" * 100_000)
    with pytest.raises(VmUnreachable, match="is invalid"):
        find_vm("libvirt:web")


def test_without_virsh(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VmUnreachable, match="not installed") as caught:
        find_vm("libvirt:web")
    assert "libvirt-clients" in caught.value.hint


def test_commands_go_through_libvirt(virsh, qemu):
    domain = Domain("web", UUID, None)
    with LibvirtMonitor(domain) as monitor:
        assert monitor.qemu_pid == qemu.pid
        words = virsh('{"return": {"status": "paused"}, "id": "libvirt-9"}')
        assert monitor.status() == "paused"
        assert words.read_text().splitlines() == [
            "--quiet", "qemu-monitor-command", "--domain", UUID, "--cmd",
            '{"execute": "query-status"}',
        ]  # fmt: skip
        virsh('{"error": {"class": "GenericError", "desc": "no"}}')
        with pytest.raises(ExecuteError, match="refused qom-list: no"):
            monitor.execute("qom-list", path="/objects")
        for nonsense in ("", "[]", "{}", '{"error": 1}'):
            virsh(nonsense)
            with pytest.raises(VmUnreachable, match="not QMP"):
                monitor.status()


def test_a_libvirt_that_hangs(virsh, qemu):
    virsh(wait=5)
    with pytest.raises(VmUnreachable, match=r"within 0\.2 s"):
        LibvirtMonitor(Domain("web", UUID, None), timeout=0.2).status()


def test_a_domain_of_another_host():
    with pytest.raises(VmUnreachable, match="no QEMU processes"):
        LibvirtMonitor(Domain("web", UUID, None))


def test_the_process_points_to_libvirt(qemu):
    process = qemu_process(qemu.pid)
    assert (process.name, process.uuid, process.libvirt) == ("web", UUID, True)
    for spec in (f"pid:{qemu.pid}", "name:web"):
        with pytest.raises(VmUnreachable, match="libvirt owns") as caught:
            find_vm(spec)
        assert caught.value.hint == "--vm libvirt:web"
