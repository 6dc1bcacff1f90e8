"""Daemons are started, recognised and ended; nobody else is."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ovr.errors import LabError
from ovr.lab.process import Process, await_socket, last_line, spawn


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_spawn_and_end(tmp_path):
    process = spawn(["/bin/sh", "-c", "echo here; exec sleep 60"], tmp_path / "log")
    assert process.alive
    assert os.getsid(process.pid) == process.pid
    while last_line(tmp_path / "log") != "here":
        time.sleep(0.01)
    process.end()
    assert not process.alive
    assert not Path(f"/proc/{process.pid}").exists()  # not even a zombie
    process.end()


def test_end_of_one_that_does_not_listen(tmp_path):
    script = "import signal, time; signal.signal(15, 1); print(1, flush=True); time.sleep(60)"
    process = spawn([sys.executable, "-c", script], tmp_path / "log")
    while last_line(tmp_path / "log") != "1":
        time.sleep(0.01)
    process.end(patience=0.2)
    assert not process.alive


def test_end_of_one_that_ended_by_itself_reaps_it(tmp_path):
    process = spawn(["/bin/sh", "-c", "sleep 0.1"], tmp_path / "log")
    while process.alive:
        time.sleep(0.01)
    process.end()
    assert not Path(f"/proc/{process.pid}").exists()


def test_a_reused_pid_is_somebody_else():
    with subprocess.Popen(["sleep", "60"]) as other:
        real = Process.find(other.pid)
        stranger = Process(other.pid, real.started - 1)
        assert real.alive
        assert not stranger.alive
        stranger.end(patience=0.1)
        assert other.poll() is None
        other.kill()


def test_a_zombie_is_dead():
    with subprocess.Popen(["sleep", "60"]) as child:
        process = Process.find(child.pid)
        child.send_signal(signal.SIGKILL)
        while state(child.pid) != "Z":
            time.sleep(0.01)
        assert not process.alive
        with pytest.raises(ProcessLookupError):
            Process.find(child.pid)


def test_no_such_program(tmp_path):
    with pytest.raises(LabError, match="cannot be started"):
        spawn([str(tmp_path / "none")], tmp_path / "log")


def test_await_socket(tmp_path):
    path, log = tmp_path / "socket", tmp_path / "log"
    idle = spawn(["/bin/sleep", "60"], log)
    with pytest.raises(LabError, match=r"within 0\.1 s"):
        await_socket(path, idle, log, patience=0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        await_socket(path, idle, log)
    idle.end()
    path.unlink()
    failing = spawn(["/bin/sh", "-c", "sleep 0.1; echo it broke >&2; exit 1"], log)
    with pytest.raises(LabError, match="died: it broke"):
        await_socket(path, failing, log)
    failing.end()


def test_last_line(tmp_path):
    log = tmp_path / "log"
    assert last_line(log) == "(no log)"
    log.write_bytes(b"one\ntwo \xff\n\n three\n\n")
    assert last_line(log) == "three"
    assert last_line(log, 2) == "two \ufffd | three"
