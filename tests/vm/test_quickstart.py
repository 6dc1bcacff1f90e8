"""docs/quickstart.md, word by word: a new user, and a VM made with Debian's own tools."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
WITHOUT_KVM = re.search(r"add `(-machine accel=tcg [^`]*)`", TEXT)
BOOT_SECONDS = 900  # systemd under TCG, on a busy machine
MEMORY_FILE = "/dev/shm/quickstart"


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
def in_a_terminal_of_its_own(command, env, log) -> Iterator[subprocess.Popen]:
    with log.open("wb") as out:
        vm = subprocess.Popen(
            ["bash", "-euc", command], cwd=log.parent, env=env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        yield vm
    finally:
        if vm.poll() is None:
            os.killpg(vm.pid, signal.SIGKILL)
        vm.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="the quickstart is for root")
@pytest.mark.timeout(2400)
def test_every_command(tmp_path):
    assert WITHOUT_KVM
    port, ram = free_port(), f"{MEMORY_FILE}-{os.getpid()}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"PATH": path, "HOME": str(tmp_path), "LANG": "C.UTF-8"}

    def said(text):
        for ours, theirs in (("2222", str(port)), (MEMORY_FILE, ram)):
            text = text.replace(ours, theirs)
        return text

    def run(block):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", said(block)], cwd=tmp_path, env=env,
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    [at] = [n for n, block in enumerate(BLOCKS) if block.startswith("debvm-run")]
    for block in BLOCKS[:at]:
        run(block)
    log = tmp_path / "vm.log"
    start = f"{said(BLOCKS[at]).rstrip()} {WITHOUT_KVM[1]}"
    try:
        with in_a_terminal_of_its_own(start, env, log) as vm:
            await_ssh(port, vm, log)
            printed = [run(block) for block in BLOCKS[at + 1 : -1]]
            with suppress(AssertionError):  # the connection may end before its command
                run(BLOCKS[-1])
            vm.wait(BOOT_SECONDS)
    finally:
        Path(ram).unlink(missing_ok=True)
    assert "Looks good." in printed[1]
    (before, was), (after, is_now) = (line.split() for line in printed[-1].splitlines())
    assert int(after) > int(before)
    assert was == is_now == "right"
    assert "<svg" in (tmp_path / "restore.html").read_text()
