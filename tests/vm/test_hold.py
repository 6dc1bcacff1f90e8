"""QEMU as people start it, where a parent answers each stop: it is held all the same."""

import os
import pty
import select
import shlex
import subprocess
import termios
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import ovr
from ovr import lab
from ovr.errors import CheckFailed
from ovr.lab import boot, demo
from ovr.lab.demo import answer_of
from ovr.lab.process import Process
from ovr.vm.hold import Holder
from tests.vm.conftest import EVERYTHING, PREFIX, SIZE, end_workload

SUITE = "trixie"
TIMES = 3 if EVERYTHING else 1  # each with several holds


def states(pid):
    return {
        (thread / "stat").read_text().rpartition(") ")[2][0]
        for thread in Path(f"/proc/{pid}/task").iterdir()
    }


@pytest.fixture
def ends(monkeypatch):
    """The states of QEMU's threads at the end of every hold."""
    seen = []
    original = Holder.held

    @contextmanager
    def held(self):
        with original(self):
            yield
            seen.append(states(self._pid))

    monkeypatch.setattr(Holder, "held", held)
    return seen


def restored(vm, dump):
    end_workload(vm)
    with ovr.attach(f"lab:{vm.name}") as attached:
        report = attached.restore(dump.path, verify="full")
    assert report.held["by"] == "ptrace"
    answer = answer_of(vm, dump.pid)
    assert (answer.words, answer.wrong) == (SIZE // 8, 0)
    end_workload(vm)


@pytest.fixture
def tmux(tmp_path):
    socket = tmp_path / "tmux"

    def run(*arguments):
        return subprocess.run(
            ["tmux", "-S", str(socket), "-f", "/dev/null", *arguments],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip

    yield run
    subprocess.run(["tmux", "-S", str(socket), "kill-server"], check=False, capture_output=True)


def qemu_below(pid, directory):
    """The process that was started there, once it is QEMU, and has opened its console."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for one in (pid, *children(pid)):
            is_qemu = Path(f"/proc/{one}/comm").read_text().startswith("qemu-system")
            if is_qemu and (directory / "console.log").exists():
                return Process.find(one)
        time.sleep(0.1)
    raise AssertionError("QEMU does not start")


def children(pid):
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def test_in_tmux(dumps, tmux, ends, monkeypatch):
    """It tells whatever stops to go on: server_child_stopped() in server.c."""

    def launch(command, directory):
        tmux("new-session", "-d", "exec " + shlex.join(command))
        return qemu_below(int(tmux("list-panes", "-F", "#{pane_pid}")), directory)

    monkeypatch.setattr(boot, "_launch", launch)
    vm = lab.up(f"{PREFIX}tmux", suite=SUITE, memory="1G")
    try:
        demo.prepare(vm)
        for _ in range(TIMES):
            restored(vm, dumps[SUITE])
        assert ends and all(state == {"t"} for state in ends)
    finally:
        vm.down()


class Shell:
    """An interactive shell with job control, on a terminal of its own."""

    def __init__(self):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.environ.update(PS1="shell$ ", TERM="dumb")
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])

    def type(self, line):
        os.write(self.terminal, f"{line}\n".encode())

    def said(self):
        text = b""
        while select.select([self.terminal], [], [], 0.5)[0]:
            try:
                text += os.read(self.terminal, 65536)
            except OSError:
                break
        return text.decode(errors="replace")

    def close(self):
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        os.close(self.terminal)


@pytest.fixture
def shell():
    shell = Shell()
    yield shell
    shell.close()


def jobs_of(pid):
    """Its process group, and its terminal's foreground process group."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return fields[2], fields[5]


def test_in_the_foreground_of_a_shell(dumps, shell, ends, monkeypatch, tmp_path):
    """With -nographic, the terminal in QEMU's hands."""
    script = tmp_path / "qemu.sh"

    def launch(command, directory):
        extra = ["-nographic", "-chardev", "stdio,id=tty,mux=on,signal=off", "-mon", "chardev=tty"]
        script.write_text("exec " + shlex.join([*command, *extra]))
        shell.type(f"bash {script}")
        return qemu_below(shell.pid, directory)

    monkeypatch.setattr(boot, "_launch", launch)
    vm = lab.up(f"{PREFIX}shell", suite=SUITE, memory="1G")
    try:
        demo.prepare(vm)
        shell.said()
        before = termios.tcgetattr(shell.terminal), jobs_of(vm.pid)
        group, foreground = before[1]
        assert group == foreground
        for _ in range(TIMES):
            restored(vm, dumps[SUITE])
        assert (termios.tcgetattr(shell.terminal), jobs_of(vm.pid)) == before
        assert "Stopped" not in shell.said()
        assert ends and all(state == {"t"} for state in ends)
        shell.type("info status")
        assert "running" in shell.said()
    finally:
        vm.down()


def test_under_a_debugger(pool, dumps):
    """A clean refusal; without it the restore works."""
    vm = pool.get(SUITE, memory="1G")
    end_workload(vm)
    strace = subprocess.Popen(
        ["strace", "-f", "-e", "trace=none", "-p", str(vm.pid)], stderr=subprocess.PIPE, text=True
    )
    try:
        assert "attached" in strace.stderr.readline()
        said = rf"traced by process {strace.pid} \(strace\)"
        with ovr.attach(f"lab:{vm.name}") as attached, pytest.raises(CheckFailed, match=said):
            attached.restore(dumps[SUITE].path)
        assert vm.sh(f"test ! -e /proc/{dumps[SUITE].pid}").status == 0
    finally:
        strace.terminate()
        strace.communicate()
    restored(vm, dumps[SUITE])
