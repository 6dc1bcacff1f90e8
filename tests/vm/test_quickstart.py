"""docs/quickstart.md, word by word: a new user, and a VM made with Debian's own tools.

The VM is one with systemd and apt, so it also shows the agent's ways of docs/guest.md.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.documents import block, blocks, commands, run, said, text_of
from tests.vm.conftest import EVERYTHING

BLOCKS = blocks("docs/quickstart.md", "sh")
WITHOUT_KVM = re.search(r"add `(-machine accel=tcg [^`]*)`", text_of("docs/quickstart.md"))
CHECK = block("docs/quickstart.md", "ovr check")
BOOT_SECONDS = 900  # systemd under TCG, on a busy machine
MEMORY_FILE = "/dev/shm/quickstart"

BY_APT = block("docs/guest.md", "apt install")  # as in the quickstart itself
WAYS = (
    block("docs/guest.md", "systemctl enable"),
    block("docs/guest.md", "ovr-agent --vsock-port"),
)
# Whatever way the agent came by before, and whatever it left.
WITHOUT_AGENT = """
    systemctl disable -q --now ovr-agent; dpkg -P ovr-agent
    rm -f ovr-agent* /usr/sbin/ovr-agent /etc/systemd/system/ovr-agent.service
    systemctl daemon-reload
    ! pgrep -x ovr-agent
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def await_ssh(port, vm, log):
    """QEMU takes connections at once; who speaks is the guest."""
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline:
        assert vm.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                if connection.recv(4) == b"SSH-":
                    return
        except OSError:
            pass
        time.sleep(1)
    raise AssertionError("no ssh in the guest: " + log.read_text(errors="replace")[-3000:])


@contextmanager
def in_a_terminal_of_its_own(command, directory, log) -> Iterator[subprocess.Popen]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with log.open("wb") as out:
        vm = subprocess.Popen(
            ["bash", "-euc", command], cwd=directory, start_new_session=True,
            env={**os.environ, "PATH": path, "HOME": str(directory)},
            stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        yield vm
    finally:
        if vm.poll() is None:
            os.killpg(vm.pid, signal.SIGKILL)
        vm.wait()


def in_the_guest(script, directory):
    return run(f"ssh -F ssh_config vm {shlex.quote(script)}", directory, HOME=str(directory))


def comes_by(way, number, directory):
    """Bring the agent into the guest in a way of docs/guest.md, and have ovr look for it."""
    in_the_guest(WITHOUT_AGENT, directory)
    made = directory / f"way-{number}"
    made.mkdir()
    run("\n".join(commands(way, "on the host")), made)
    run(f"scp -q -F ssh_config {made}/* vm:", directory, HOME=str(directory))
    for command in commands(way, "in the guest"):
        by_init = command.startswith("ovr-agent ")  # from where scp has put it
        background = f"setsid ./{command} < /dev/null > /dev/null 2>&1 &"
        in_the_guest(background if by_init else command, directory)
    assert "Looks good." in run(CHECK, directory)


def test_by_apt():
    [made] = commands(BY_APT, "on the host")
    [installed] = commands(BY_APT, "in the guest")
    assert f"{made}\n" in BLOCKS
    assert any(f"vm '{installed}'\n" in text for text in BLOCKS)


@pytest.mark.skipif(os.geteuid() != 0, reason="the quickstart is for root")
@pytest.mark.timeout(2400)
def test_every_command(tmp_path):
    assert WITHOUT_KVM
    port, ram = free_port(), f"{MEMORY_FILE}-{os.getpid()}"

    def command(text):
        found = {"2222": str(port), MEMORY_FILE: ram}
        return said(text, {theirs: ours for theirs, ours in found.items() if theirs in text})

    def perform(text):
        return run(command(text), tmp_path, HOME=str(tmp_path), LANG="C.UTF-8")

    [at] = [n for n, text in enumerate(BLOCKS) if text.startswith("debvm-run")]
    for text in BLOCKS[:at]:
        perform(text)
    log = tmp_path / "vm.log"
    start = f"{command(BLOCKS[at]).rstrip()} {WITHOUT_KVM[1]}"
    try:
        with in_a_terminal_of_its_own(start, tmp_path, log) as vm:
            await_ssh(port, vm, log)
            printed = [perform(text) for text in BLOCKS[at + 1 : -1]]
            # By default as by the package, and as by the init of the lab's guests.
            for number, way in enumerate(WAYS if EVERYTHING else ()):
                comes_by(way, number, tmp_path)
            with suppress(AssertionError):  # the connection may end before its command
                perform(BLOCKS[-1])
            vm.wait(BOOT_SECONDS)
    finally:
        Path(ram).unlink(missing_ok=True)
    assert "Looks good." in printed[1]
    (before, was), (after, is_now) = (line.split() for line in printed[-1].splitlines())
    assert int(after) > int(before)
    assert was == is_now == "right"
    assert "<svg" in (tmp_path / "restore.html").read_text()
