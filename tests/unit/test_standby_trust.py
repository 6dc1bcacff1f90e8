"""Trust between the standby process and its clients, in both directions."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from ovr.host import UntrustedPath
from ovr.standby import place
from ovr.standby.messages import StandbyError
from ovr.standby.place import Place, connect
from ovr.standby.proof import Peer

from .standby_programs import FALSE_CLIENT, FALSE_SERVER, REUSED_CLIENT, REUSED_SERVER
from .test_standby import (  # noqa: F401 - fixtures
    CLIENT,
    ITSELF,
    SERVER,
    client,
    name,
    said,
    server,
    socket_path,
    standing_by,
    vm,
)  # fmt: skip

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do what root is kept from")

# A process with uid 0 and the directory, but without the capabilities of the standby process.
ELSEWHERE = {
    "mount": ["unshare", "--mount"],
    "pid": ["unshare", "--pid", "--fork", "--mount-proc"],
    "uts": ["unshare", "--uts"],
    "network": ["unshare", "--net"],
    "user": ["unshare", "--user", "--map-root-user"],
    "no capabilities": ["setpriv", "--bounding-set=-all", "--inh-caps=-all"],
    "no new privileges": ["setpriv", "--no-new-privs"],
    "container": [
        "unshare", "--mount", "--pid", "--fork", "--mount-proc", "--uts", "setpriv",
        "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs",
    ],
}  # fmt: skip


in_each_place = pytest.mark.parametrize("elsewhere", ELSEWHERE)


def start(program: str, name: str, *before: str, **options) -> subprocess.Popen:  # noqa: F811
    command = [*before, sys.executable, "-c", program, name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


@root_only
@in_each_place
def test_a_server_elsewhere_is_told_nothing(name, elsewhere, tmp_path):  # noqa: F811
    """No byte of the environment, no argument, no descriptor; the command does its work itself."""
    secret = tmp_path / "shadow"
    secret.write_text("root:x")
    fd = os.open(secret, os.O_RDONLY)
    with start(FALSE_SERVER, name, *ELSEWHERE[elsewhere]) as process:
        assert process.stdout.readline() == "listens\n"
        environment = {**os.environ, "API_TOKEN": "hunter2"}
        code, note = said(name, "exit", "5", env=environment, pass_fds=[fd])
        told, files = json.loads(process.stdout.readline())
    os.close(fd)
    assert (code, files) == (99, 0)
    assert "not done by the standby process: " in note
    assert [words[0] for words in told][:1] == ["hello"]
    assert {words[0] for words in told} <= {"hello", "proof"}
    assert "hunter2" not in json.dumps(told)


@root_only
@in_each_place
def test_a_client_elsewhere_is_not_served(name, server, elsewhere):  # noqa: F811
    with start(FALSE_CLIENT, name, *ELSEWHERE[elsewhere]) as process:
        output, _ = process.communicate(timeout=30)
    [answer] = output.splitlines()
    assert answer.startswith("no its ") or answer.startswith("no /proc/"), answer
    assert said(name, "exit", "5") == (5, "")


@root_only
def test_the_false_ones_are_served_where_they_belong(name, server):  # noqa: F811
    """They do what it takes: what they do not get above is because of where they are."""
    with start(FALSE_CLIENT, name) as process:
        output, _ = process.communicate(timeout=30)
    assert output.splitlines()[1:] == ["ready", "ended 5"]
    server.terminate()
    server.wait()
    with start(FALSE_SERVER, name) as process:
        assert process.stdout.readline() == "listens\n"
        assert said(name, "exit", "5", env={**os.environ, "API_TOKEN": "hunter2"}) == (0, "")
        told, _ = json.loads(process.stdout.readline())
    assert "API_TOKEN=hunter2" in told[2]


@contextmanager
def in_a_pid_namespace(program: str, name: str, argument: str):  # noqa: F811
    # All that is in there ends with its first process.
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c"]
    with subprocess.Popen(
        [*command, program, name, argument], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


reusable = pytest.mark.skipif(
    not Path("/proc/sys/kernel/ns_last_pid").exists(),
    reason="this kernel has no CONFIG_CHECKPOINT_RESTORE: no pid can be chosen",
)


@root_only
@reusable
def test_a_client_whose_pid_is_reused(name):  # noqa: F811
    with in_a_pid_namespace(REUSED_CLIENT, name, SERVER) as process:
        lines = []
        while not {"done", "end"} <= {line.split(":")[0] for line in lines}:
            line = process.stdout.readline().strip()
            assert line, lines
            lines.append(line)
    assert "ready" not in lines
    assert "no a message comes from another process" in lines


@root_only
@reusable
def test_a_server_whose_pid_is_reused(name):  # noqa: F811
    with in_a_pid_namespace(REUSED_SERVER, name, CLIENT) as process:
        lines = []
        while not lines or not lines[-1].startswith("done"):
            line = process.stdout.readline().strip()
            assert line, lines
            lines.append(line)
    assert "restore" not in lines
    note = "not done by the standby process: a message comes from another process"
    assert lines[-1] == f"done 99 {note}"


def test_clients_that_are_silent_delay_nobody(name, server, monkeypatch):  # noqa: F811
    """At whatever stage; of those that say nothing more, there are more than are kept."""
    monkeypatch.setattr(sys, "prefix", name)
    silent = []
    try:
        for number in range(100):
            connection = connect()
            silent.append(connection)
            connection.sendall(
                (b"", b"\x05", b"\x05\0\0\0hel", b"\x07\0\0\0hello\x000")[number % 4]
            )
        # At the first try: with any of them waited for, the command would have given up.
        assert said(name, "exit", "5") == (5, "")
    finally:
        for connection in silent:
            connection.close()


def test_a_client_that_is_silent_is_not_kept(name, server, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys, "prefix", name)
    with connect() as connection:
        connection.settimeout(60)
        greeting = connection.recv(100)
        assert b"hello" in greeting
        assert connection.recv(100) == b""
    assert said(name, "exit", "5") == (5, "")


@root_only
def test_another_users_process_is_refused():
    """Though none of them can get here."""
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(chr(0) + sys.argv[1])"
    )
    address = f"ovr-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + address)
        listener.listen()
        command = ["/usr/bin/python3", "-c", f"{program}; s.recv(1)", address]
        with subprocess.Popen(command, user=65534, cwd="/"):
            connection, _ = listener.accept()
            with connection, pytest.raises(StandbyError, match="another user's"):
                Peer(connection)


def test_a_client_that_never_says_go_delays_nobody(name, server, monkeypatch):  # noqa: F811
    from ovr.standby.client import _request  # noqa: PLC0415
    from ovr.standby.messages import send  # noqa: PLC0415
    from ovr.standby.proof import meet  # noqa: PLC0415

    monkeypatch.setattr(sys, "prefix", name)
    silent = [connect() for _ in range(5)]
    try:
        for connection in silent:
            inbox = meet(connection)
            send(connection, [b"restore", *_request(["restore", "exit", "7"], [])])
            assert inbox.wait().fields == [b"ready"]
        assert said(name, "exit", "5") == (5, "")
    finally:
        for connection in silent:
            connection.close()


@pytest.fixture
def elsewhere_in(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "run" / "standby"
    monkeypatch.setattr(place, "_directory_path", lambda: str(path))
    return path


def test_the_directory_is_made_for_this_user_alone(elsewhere_in):
    with Place() as found:
        found.listen()
        assert stat.S_IMODE(elsewhere_in.stat().st_mode) == 0o700
        connect().close()
    assert list(elsewhere_in.iterdir()) == []


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_directory_that_is_open_to_others(elsewhere_in, mode):
    elsewhere_in.mkdir(parents=True)
    elsewhere_in.chmod(mode)
    for attempt in (Place, connect):
        with pytest.raises(UntrustedPath):
            attempt()
    assert list(elsewhere_in.iterdir()) == []


@root_only
@pytest.mark.parametrize("level", ["standby", "run"])
def test_a_directory_of_another_user(elsewhere_in, level):
    elsewhere_in.mkdir(parents=True, mode=0o700)
    os.chown(elsewhere_in if level == "standby" else elsewhere_in.parent, 12345, 12345)
    for attempt in (Place, connect):
        with pytest.raises(UntrustedPath, match="belongs to user 12345"):
            attempt()
    assert list(elsewhere_in.iterdir()) == []


@root_only
@pytest.mark.parametrize("level", ["standby", "run"])
def test_a_link_of_another_user_on_the_way(elsewhere_in, tmp_path, level):
    real = tmp_path / "real"
    (real / "standby").mkdir(parents=True, mode=0o700)
    link = elsewhere_in if level == "standby" else elsewhere_in.parent
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(real / "standby" if level == "standby" else real)
    os.lchown(link, 12345, 12345)
    for attempt in (Place, connect):
        with pytest.raises(UntrustedPath, match=r"the link .* belongs to user 12345"):
            attempt()
    assert list((real / "standby").iterdir()) == []


@root_only
def test_where_users_meet(tmp_path, monkeypatch):
    """In their runtime directory, if it is theirs alone; else in their cache."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert place._directory_path() == "/run/ovr-standby"
    monkeypatch.setattr(place.os, "geteuid", lambda: 12345)
    assert place._directory_path() == "/cache/ovr/standby"  # root's
    os.chown(tmp_path, 12345, 12345)
    assert place._directory_path() == f"{tmp_path}/ovr-standby"
    tmp_path.chmod(0o755)
    assert place._directory_path() == "/cache/ovr/standby"
    monkeypatch.setenv("XDG_RUNTIME_DIR", ".")
    assert place._directory_path() == "/cache/ovr/standby"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert place._directory_path() == "/cache/ovr/standby"


def test_the_socket_of_a_server_that_was_killed(name, vm, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys, "prefix", name)
    with standing_by(name, vm) as killed:
        killed.kill()
        killed.wait()
        assert socket_path().is_socket()
        assert said(name, "exit", "5") == (99, "\n")
        with standing_by(name, vm):
            assert said(name, "exit", "5") == (5, "")


@pytest.mark.parametrize("end", ["the VM", signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_no_socket_is_left(name, vm, monkeypatch, end):  # noqa: F811
    monkeypatch.setattr(sys, "prefix", name)
    with standing_by(name, vm) as process:
        assert said(name, "exit", "5") == (5, "")
        assert socket_path().is_socket()
        if end == "the VM":
            vm.kill()
        else:
            process.send_signal(end)
        process.wait(30)
    assert not socket_path().exists()


def test_one_stands_by(name, vm, server, monkeypatch):  # noqa: F811
    """The second does not take the place of the first; it says so."""
    command = [sys.executable, "-c", SERVER, name, str(vm.pid)]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert "another process stands by already" in second.stderr
    assert said(name, "exit", "5") == (5, "")


def test_a_socket_that_another_has_made_is_not_removed(name, vm, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys, "prefix", name)
    with standing_by(name, vm) as process:
        socket_path().unlink()
        with standing_by(name, vm):
            process.terminate()
            process.wait()
            assert said(name, "exit", "5") == (5, "")
