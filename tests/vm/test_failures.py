"""Failures: one line with the cure, the right exit code, and a VM that is none the worse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import ovr
from ovr import lab
from ovr.errors import AgentUnreachable
from ovr.images import PAGEMAP_DTYPE
from ovr.images.pagemap import Pagemap, decode_pagemap, encode_pagemap
from ovr.lab.demo import answer_of
from tests.vm.conftest import EVERYTHING, PREFIX, SIZE, UMASK, alive

KILLED_IN_THE_MIDDLE = """
import os, signal, sys
import ovr
from ovr.attempt import copier, in_holds

in_holds.HOLD_BYTES = 16 << 20
copied = 0
original = copier.Copier._copy

def copy(self, ready, runs):
    global copied
    done = original(self, ready, runs)
    copied += done
    if copied >= 64 << 20:
        os.kill(os.getpid(), signal.SIGKILL)  # with the VM held, a third of the pages written
    return done

copier.Copier._copy = copy
with ovr.attach(sys.argv[1]) as vm:
    vm.restore(sys.argv[2])
"""


@pytest.fixture(params=("trixie", "bookworm") if EVERYTHING else ("trixie",))
def suite(request):
    """These failures do not depend on changes in newer kernels."""
    return request.param


def ovr_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "ovr", *map(str, arguments)], capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip


def refused(done, code, *words):
    assert done.returncode == code, done.stderr
    [line] = done.stderr.splitlines()
    for word in words:
        assert word in line
    return line


def unharmed(vm, dump):
    """The VM runs, nothing of the tree is left, and a restore succeeds."""
    assert not alive(vm, dump.pid)
    with ovr.attach(f"lab:{vm.name}") as attached:
        assert attached.qmp.status() == "running"
        attached.restore(dump.path)
    answer = answer_of(vm, dump.pid)
    assert (answer.words, answer.wrong, int(answer.umask, 8)) == (SIZE // 8, 0, UMASK)
    assert "BUG" not in vm.console.read_text(errors="replace")


@pytest.fixture
def copy(dump, tmp_path):
    path = tmp_path / "images"
    shutil.copytree(dump.path, path)
    return path


def test_killed_in_the_middle_of_the_memory_step(vm, dump):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_IN_THE_MIDDLE, f"lab:{vm.name}", dump.path], check=False
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 15
    while alive(vm, dump.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert vm.sh("pgrep -x criu").status != 0
    unharmed(vm, dump)


def test_interrupted(vm, dump):
    # A background job of a script may have inherited SIG_IGN for it.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script = heard + KILLED_IN_THE_MIDDLE.replace("SIGKILL", "SIGINT")
    done = subprocess.run(
        [sys.executable, "-c", script, f"lab:{vm.name}", dump.path], check=False,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode not in (0, -signal.SIGKILL)
    assert not alive(vm, dump.pid)
    unharmed(vm, dump)


def test_truncated_pages(vm, dump, copy):
    [pages] = copy.glob("pages-*.img")
    os.truncate(pages, SIZE // 2)
    done = ovr_command("restore", "-D", copy, "--vm", f"lab:{vm.name}")
    refused(done, 6, pages.name, "dump again")
    unharmed(vm, dump)


def test_a_pagemap_outside_of_every_area(vm, dump, copy):
    path = copy / f"pagemap-{dump.pid}.img"
    old = decode_pagemap(path.read_bytes(), path.name)
    entries = old.entries.astype(PAGEMAP_DTYPE)
    entries["gva"][0] = 0x1000
    path.write_bytes(encode_pagemap(Pagemap(old.pages_id, entries, old.compat), path.name))
    done = ovr_command("restore", "-D", copy, "--vm", f"lab:{vm.name}")
    refused(done, 6, path.name, "0x1000")
    unharmed(vm, dump)


def test_unknown_magic(vm, dump, copy):
    path = copy / f"core-{dump.pid}.img"
    path.write_bytes(b"\xde\xad\xbe\xef" + path.read_bytes()[4:])
    done = ovr_command("restore", "-D", copy, "--vm", f"lab:{vm.name}")
    refused(done, 5, path.name, "magic")
    unharmed(vm, dump)


def test_no_agent(vm, dump):
    done = ovr_command(
        "restore", "-D", dump.path, "--vm", f"lab:{vm.name}", "--agent", f"{vm.agent}77"
    )
    refused(done, 3, "agent")
    unharmed(vm, dump)


def test_no_vm(dump):
    refused(ovr_command("ps", "--vm", "qmp:/nowhere/qmp"), 3, "/nowhere/qmp")
    refused(ovr_command("ps", "--vm", "lab:nobody"), 3, "nobody")


def test_pid_taken(vm, dump):
    vm.sh(f"echo {dump.pid - 1} > /proc/sys/kernel/ns_last_pid; sleep 1000 & echo $! > /tmp/taken")
    assert int(vm.sh("cat /tmp/taken").stdout) == dump.pid
    done = ovr_command("restore", "--json", "-D", dump.path, "--vm", f"lab:{vm.name}")
    refused(done, 1, str(dump.pid), "sleep")
    assert json.loads(done.stdout)["kind"] == "PidTaken"
    vm.sh(f"kill -9 {dump.pid}")
    unharmed(vm, dump)


def test_criu_in_the_guest_fails(vm, dump):
    vm.sh("mv /usr/local/bin/ovr-workload /usr/local/bin/hidden")
    done = ovr_command("restore", "-D", dump.path, "--vm", f"lab:{vm.name}")
    vm.sh("mv /usr/local/bin/hidden /usr/local/bin/ovr-workload")
    refused(done, 1, "criu", "ovr-workload")
    unharmed(vm, dump)


def test_ram_not_shared(dump, tmp_path):
    """A real QEMU whose RAM is nobody's file. It needs no guest to be refused."""
    qmp = tmp_path / "qmp"
    with subprocess.Popen(
        ["qemu-system-x86_64", "-accel", "tcg", "-m", "128M", "-display", "none", "-nodefaults",
         "-qmp", f"unix:{qmp},server=on,wait=off", "-S"],
    ) as qemu:  # fmt: skip
        try:
            deadline = time.monotonic() + 20
            while not qmp.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            done = ovr_command(
                "restore", "-D", dump.path, "--vm", f"qmp:{qmp}", "--agent", "vsock:9"
            )
            refused(done, 4, "share=on")
        finally:
            qemu.kill()


def test_check(vm):
    done = ovr_command("check", "--json", "--vm", f"lab:{vm.name}")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["ok"] is True
    assert {"QMP", "guest RAM", "guest kernel", "agent"} <= {
        item["what"] for item in found["items"]
    }
    try:
        restart_agent(vm, "mv /usr/sbin/criu /usr/sbin/criu.away")
        done = ovr_command("check", "--vm", f"lab:{vm.name}")
    finally:
        restart_agent(vm, "mv /usr/sbin/criu.away /usr/sbin/criu")
    assert done.returncode == 4
    assert "apt-get install criu" in done.stdout
    assert done.stdout.endswith("Does not look good.\n")


def test_criu_options_in_the_guests_configuration(vm, dump):
    """They are told, and not read: with --lazy-pages there would be no memory at all."""
    file = "/etc/criu/default.conf"
    vm.sh(f"mkdir -p /etc/criu && printf 'lazy-pages\nfile-locks # both\n' > {file}")
    try:
        done = ovr_command("check", "--vm", f"lab:{vm.name}")
        assert done.returncode == 0
        [line] = [line for line in done.stdout.splitlines() if file in line]
        assert f"{file} is not read" in line
        assert "give ovr restore: --file-locks; ovr cannot honour --lazy-pages" in line
        vm.sh("mv /usr/local/bin/ovr-workload /usr/local/bin/hidden")
        done = ovr_command("restore", "-D", dump.path, "--vm", f"lab:{vm.name}")
        vm.sh("mv /usr/local/bin/hidden /usr/local/bin/ovr-workload")
        refused(done, 1, "criu", "ovr-workload", f"{file} is not read", "--file-locks")
        unharmed(vm, dump)
    finally:
        vm.sh(f"rm {file}")


def restart_agent(vm, first="true", patience=20.0):
    """End the agent as its service would, after the command `first`; init starts it again.

    It asks for CRIU's version when it starts.
    """
    with vm.connect() as agent:
        old = agent.hello.pid
        agent.spawn(["/bin/sh", "-c", f"{first}; sleep 0.3; kill -TERM {old}"])
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            with vm.connect() as agent:
                if agent.hello.pid != old:
                    return
        except AgentUnreachable:
            continue
    pytest.fail("the agent does not come back")


def test_lab_commands(tmp_path):
    name = f"{PREFIX}cli"
    assert ovr_command("lab", "up", name, "--memory", "512M").returncode == 0
    try:
        assert name in ovr_command("lab", "ls").stdout
        sent, back = tmp_path / "sent", tmp_path / "back"
        sent.write_bytes(os.urandom(3_000_000))
        assert ovr_command("lab", "put", name, sent, "/tmp/file").returncode == 0
        done = ovr_command("lab", "sh", name, "stat -c %s /tmp/file; exit 3")
        assert (done.returncode, done.stdout) == (3, "3000000\n")
        assert ovr_command("lab", "get", name, "/tmp/file", back).returncode == 0
        assert back.read_bytes() == sent.read_bytes()
        refused(ovr_command("lab", "up", name), 1, "runs already")
        ram = lab.get(name).ram
    finally:
        assert ovr_command("lab", "down", name).returncode == 0
    assert name not in ovr_command("lab", "ls").stdout
    assert not any(path.exists() for path in ram)


JOB = 98765
"""An argument of the job's sleep, to find it by."""
UNDER_A_TERMINAL = f"script -qc 'exec sleep {JOB}' /dev/null"
WITHOUT = f"setsid sh -c 'sleep {JOB}; true'"


@pytest.mark.parametrize("job", [UNDER_A_TERMINAL, WITHOUT], ids=["terminal", "no-terminal"])
def test_a_shell_job(vm, tmp_path, job):
    """Its session leader is not dumped, and has the other end of its terminal, if it has one."""
    find = f"pgrep -fx 'sleep {JOB}'"
    vm.sh(f"({job} </dev/null >/dev/null 2>&1 &); until {find}; do sleep 0.1; done")
    pid = int(vm.sh(find).stdout)
    dumped = vm.sh(f"mkdir /tmp/job && criu dump -t {pid} --shell-job -D /tmp/job -o log")
    assert dumped.status == 0, vm.sh("grep Error /tmp/job/log").stdout.decode()
    vm.sh("tar -C /tmp -cf /tmp/job.tar job && rm -r /tmp/job")
    vm.get("/tmp/job.tar", tmp_path / "job.tar")
    shutil.unpack_archive(tmp_path / "job.tar", tmp_path)
    restore = ("restore", "-D", tmp_path / "job", "--vm", f"lab:{vm.name}", "--shell-job")
    try:
        if job == WITHOUT:
            done = ovr_command(*restore)
            assert done.returncode == 0, done.stderr
            assert int(vm.sh(find).stdout) == pid
        else:
            for words in (restore, restore[:-1]):
                done = ovr_command(*words)
                line = refused(done, 5, f"fd 0, 1, 2 of pid {pid} is the terminal /dev/pts/0")
                assert "setsid" in line
            assert vm.sh(find).status != 0
    finally:
        vm.sh(f"pkill -9 -fx 'sleep {JOB}'")
