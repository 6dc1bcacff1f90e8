"""Names of VMs are their owner's word: another user's process cannot pose as the VM meant."""

import os
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from ovr.errors import VmUnreachable
from ovr.vm import census
from ovr.vm.find import find_vm
from ovr.vm.libvirt import Domain, LibvirtMonitor
from ovr.vm.processes import qemu_process, qemu_processes
from tests.unit.false_qemu import NOBODY
from tests.unit.qmp_server import QmpServer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")

UUID = "7e0a3c1e-2b51-4b93-8f0e-7e35e2b3a111"
NAME = "ovr-test-posed"


@contextmanager
def running(*words, user=0):
    """A process with the command line of a QEMU."""
    # It waits without a child, which would be such a process, too, for a moment.
    command = ["qemu-system-x86_64", "-c", "read line", *words]
    with subprocess.Popen(
        command, executable="/bin/sh", stdin=subprocess.PIPE, user=user, cwd="/"
    ) as process:
        try:
            while words[-1] not in Path(f"/proc/{process.pid}/cmdline").read_text():
                time.sleep(0.01)
            yield process.pid
        finally:
            process.kill()


@pytest.fixture
def server(tmp_path):
    server = QmpServer(tmp_path / "qmp")
    yield server
    server.close()


def test_the_callers_own_is_found_by_name(server):
    socket = ("-qmp", f"unix:{server.path},server=on")
    with running("-name", NAME, *socket) as own, running("-name", NAME, *socket, user=NOBODY):
        address = find_vm(f"name:{NAME}")
        assert (address.qmp, address.pid) == (server.path, own)


def test_another_users_is_not(server):
    with (
        running("-name", NAME, "-qmp", f"unix:{server.path}", user=NOBODY) as pid,
        pytest.raises(VmUnreachable, match=f"another user's QEMU: pid:{pid} of user {NOBODY}"),
    ):
        find_vm(f"name:{NAME}")


def test_a_set_uid_program_is_nobodys():
    """Its user says what is on its command line; its effective user is root."""
    command = ["qemu-system-x86_64", "-name", NAME]
    pid = os.fork()
    if not pid:
        os.setresuid(NOBODY, 0, 0)
        os.execv("/bin/sleep", [*command[:1], "60"])
    try:
        while b"qemu-system" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            time.sleep(0.01)
        assert qemu_process(pid).uid is None
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_a_monitor_that_is_another_process_s(server):
    """Any path can be on a command line; here the test itself listens there."""
    with running("-name", NAME, "-qmp", f"unix:{server.path}", user=NOBODY) as pid:
        with pytest.raises(VmUnreachable, match=f"not that of process {pid}") as caught:
            find_vm(f"pid:{pid}").connect(2)
        assert "qmp:PATH" in caught.value.hint
        (one,) = [vm for vm in census.found_vms() if vm.pid == pid]
        assert one.names == (f"qmp:{server.path}", f"pid:{pid}")
        assert "not that of process" in str(one.problem)
    with find_vm(f"qmp:{server.path}").connect(2) as qmp:
        assert qmp.qemu_pid == os.getpid()


def test_a_domain_runs_as_the_user_that_libvirt_says():
    with running("-name", NAME, "-uuid", UUID, user=NOBODY) as pid:
        for uid in (None, 0, 64055):
            with pytest.raises(VmUnreachable, match="no QEMU processes of user"):
                LibvirtMonitor(Domain(NAME, UUID, None, uid))
        assert LibvirtMonitor(Domain(NAME, UUID, None, NOBODY)).qemu_pid == pid
        with running("-name", NAME, "-uuid", UUID) as own:
            assert LibvirtMonitor(Domain(NAME, UUID, None, 0)).qemu_pid == own


@pytest.mark.parametrize("depth", [100, 500, 900, 980, 990, 1_000, 10_000])
def test_options_that_are_nested_deeply(depth):
    """Any user's process has a command line, and all are looked at."""
    value = '{"driver":' + "[" * depth + "]" * depth + "}"
    with running("-device", value, "-name", NAME, user=NOBODY) as pid:
        (one,) = [process for process in qemu_processes() if process.pid == pid]
        assert one.agent is None
