"""A process that stands by does for a command what it would have done itself: `ovr.standby`."""

import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ovr.host.credentials import peer_of
from ovr.standby import place
from ovr.standby.messages import Inbox, StandbyError, close_all, send, version
from ovr.standby.place import connect
from ovr.standby.proof import meet

# Both sides meet where their Python is said to be: here each test has a place of its own.
NAMED = "import sys; sys.prefix = sys.argv.pop(1)\n"

LOOK = """
import fcntl, json, os, resource, signal, sys, time

def look():
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    streams = (sys.stdin, sys.stdout, sys.stderr)
    files = {}
    for number in sorted(map(int, os.listdir("/proc/self/fd"))):
        try:
            files[number] = os.readlink(f"/proc/self/fd/{number}"), fcntl.fcntl(number, 1)
        except OSError:
            pass  # that of the listing
    return {
        "arguments": sys.argv[1:],
        "directory": os.getcwd(),
        "environment": sorted(os.environ.items()),
        "files": files,
        "streams": [s and (s.encoding, s.errors, s.line_buffering) for s in streams],
        "status": [status[name] for name in ("Umask", "SigIgn", "SigBlk", "SigCgt", "CapEff")],
        "limits": [resource.getrlimit(n) for n in range(16)],
        "nice": os.nice(0),
        "read": sys.stdin and sys.stdin.read(),
    }

def run():
    match sys.argv[1:]:
        case ["restore", "look", path, *_]:
            with open(path, "w") as file:
                json.dump(look(), file)
            print("seen", flush=True)
            os._exit(0)
        case ["restore", "exit", code]:
            os._exit(int(code))
        case ["restore", "die", number]:
            os.kill(os.getpid(), int(number))
        case ["restore", "fail"]:
            raise RuntimeError("no luck")
        case ["restore", "wait"]:
            def leave(number, _):
                os.write(1, b"got %d\\n" % number)
                os._exit(77)
            signal.signal(signal.SIGTERM, leave)
            print(os.getpid(), flush=True)
            time.sleep(60)
"""

SERVER = f"""{NAMED}{LOOK}
from ovr.standby.place import Place
from ovr.standby.server import Server

for path in sys.argv[2:]:
    sys.path.insert(0, path)
    import subject
with Place() as place:
    place.listen()
    server = Server(place, run)
    server.keep(int(sys.argv[1]))
    print("listens", flush=True)
    server.serve()
"""

CLIENT = f"""{NAMED}
from ovr.standby import client
code = client.restore_there(sys.argv[1:])
if code is None:
    print(*client.notes)
    code = 99
import os
sys.stdout.flush()
os._exit(code)
"""

ITSELF = f"{NAMED}{LOOK}run()"


@pytest.fixture
def name(monkeypatch) -> Iterator[str]:
    found = f"/test/{uuid.uuid4().hex}"
    yield found
    monkeypatch.setattr(sys, "prefix", found)
    socket_path().unlink(missing_ok=True)  # of a server that a test has killed


def socket_path() -> Path:
    return Path(place._directory_path(), place._name())


@pytest.fixture
def vm() -> Iterator[subprocess.Popen]:
    """The process whose end the server waits for."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@contextmanager
def standing_by(name: str, vm: subprocess.Popen, *paths: str | Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", SERVER, name, str(vm.pid), *map(str, paths)]
    # In the background it has no terminal, nor anything else of who started it.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout.readline() == "listens\n"
            yield server
        finally:
            server.terminate()


@pytest.fixture
def server(name, vm) -> Iterator[subprocess.Popen]:
    with standing_by(name, vm) as process:
        yield process


def client(name: str, *arguments: str, program: str = CLIENT, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", program, name, "restore", *arguments]
    return subprocess.Popen(command, text=True, **{"stdout": subprocess.PIPE, **options})


def said(name: str, *arguments: str, **options) -> tuple[int, str]:
    with client(name, *arguments, **options) as process:
        output, _ = process.communicate(timeout=30)
    return process.returncode, output


class Connection:
    """To a server; each side has made sure of the other."""

    def __init__(self, found: socket.socket) -> None:
        self.socket = found
        self._inbox = meet(found)

    def send(self, *fields: bytes) -> None:
        send(self.socket, fields)

    def receive(self) -> list[bytes]:
        message = self._inbox.wait()
        assert list(message.files) == []
        return list(message.fields)


@pytest.fixture
def connection(name, server, monkeypatch) -> Iterator[Connection]:
    monkeypatch.setattr(sys, "prefix", name)
    with connect() as found:
        yield Connection(found)


def odd() -> None:
    # Before the program begins: a process as few are.
    os.umask(0o137)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGRTMIN})


def no_streams() -> None:
    os.close(0)
    os.close(2)


@pytest.mark.parametrize("before", [None, odd, no_streams])
def test_it_is_as_the_command_itself(name, server, tmp_path, before):
    """A child looks around; so does the command where nobody stands by. Both see the same."""
    seen = []
    (tmp_path / "input").write_text("ein Wört")
    for program in (CLIENT, ITSELF):
        with (
            (tmp_path / "input").open() as source,
            (tmp_path / "output").open("a") as output,
            (tmp_path / "extra").open("w") as extra,
        ):
            path = tmp_path / "seen.json"
            number = fcntl.fcntl(extra, fcntl.F_DUPFD, 17)
            process = client(
                name, "look", str(path), "ä", "", "--x=\udcff", program=program,
                stdin=source, stdout=output, stderr=output, pass_fds=[number], cwd=tmp_path,
                env={"A": "b=c", "ODD": "\udcfe", "PYTHONIOENCODING": "latin-1:ignore"},
                preexec_fn=before,
            )  # fmt: skip
            os.close(number)
            assert process.wait(30) == 0, (tmp_path / "output").read_text()
            seen.append(json.loads(path.read_text()))
    assert seen[0] == seen[1]
    assert (tmp_path / "output").read_text() == "seen\n" * 2
    assert str(tmp_path / "extra") in [path for path, _ in seen[0]["files"].values()]
    assert seen[0]["read"] == (None if before is no_streams else "ein W\xc3\xb6rt")


@pytest.mark.parametrize("code", [0, 3, 130])
def test_exit_codes(name, server, code):
    assert said(name, "exit", str(code)) == (code, "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGABRT])
def test_it_dies_as_its_child_does(name, server, number):
    code, _ = said(name, "die", str(int(number)))
    # Python makes an exception of SIGINT.
    assert code == (1 if number == signal.SIGINT else -number)


def test_what_nobody_catches(name, server):
    with client(name, "fail", stderr=subprocess.PIPE) as process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.endswith("RuntimeError: no luck\n")


def test_signals_reach_the_child(name, server):
    with client(name, "wait") as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == f"got {int(signal.SIGTERM)}\n"
        assert process.wait(30) == 77


def test_several_at_once(name, server):
    waiting = [client(name, "wait") for _ in range(3)]
    for process in waiting:
        process.stdout.readline()
    assert said(name, "exit", "5") == (5, "")
    for process in waiting:
        process.terminate()
        assert process.wait(30) == 77
        process.stdout.close()


def test_the_child_goes_with_the_client(name, server):
    with client(name, "wait") as process:
        child = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
    wait_for_end(child)
    assert said(name, "exit", "5") == (5, "")


def test_the_child_goes_with_the_server(name, server):
    with client(name, "wait", stderr=subprocess.PIPE) as process:
        child = os.pidfd_open(int(process.stdout.readline()))
        server.kill()
        _, errors = process.communicate(timeout=30)
    wait_for_end(child)
    assert process.returncode == 1
    assert "has died, and the restore with it" in errors


def wait_for_end(pidfd: int) -> None:
    signalled = time.monotonic() + 30
    while time.monotonic() < signalled:
        try:
            signal.pidfd_send_signal(pidfd, 0)
        except ProcessLookupError:
            os.close(pidfd)
            return
        time.sleep(0.01)
    pytest.fail("it lives")


def fewer_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (77, hard))


def nicer() -> None:
    os.nice(3)


def one_cpu() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@pytest.mark.parametrize(
    ("before", "why"),
    [(fewer_files, "RLIMIT_NOFILE"), (nicer, "nice value"), (one_cpu, "Cpus_allowed")],
)
def test_what_a_child_cannot_take_over(name, server, before, why):
    if before is one_cpu and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one CPU")
    note = f"not done by the standby process: its {why} is not this process's"
    assert said(name, "exit", "5", preexec_fn=before) == (99, f"{note}\n")
    assert said(name, "exit", "5") == (5, "")


def test_nobody_stands_by(name):
    assert said(name, "exit", "5") == (99, "\n")


def test_changed_code_is_not_run(name, vm, tmp_path):
    module = tmp_path / "subject.py"
    module.write_text("first = 1\n")
    with standing_by(name, vm, tmp_path) as server:
        assert said(name, "exit", "5") == (5, "")
        module.write_text("second = 2\n")
        code, note = said(name, "exit", "5")
        assert code == 99
        assert "its code has been changed" in note
        assert server.wait(30) == 0
        assert vm.poll() is None
    assert said(name, "exit", "5") == (99, "\n")


def test_too_many_files(name, server, tmp_path):
    files = [os.open(tmp_path, os.O_RDONLY) for _ in range(201)]
    try:
        code, note = said(name, "exit", "5", pass_fds=files)
    finally:
        close_all(files)
    assert (code, "more than 200 files" in note) == (99, True)


def test_it_ends_with_the_last_vm(name, vm, connection, server):
    with subprocess.Popen(["sleep", "600"]) as other:
        connection.send(b"keep", version(), b"%d" % other.pid)
        assert connection.receive() == [b"done"]
        vm.kill()
        vm.wait()
        assert said(name, "exit", "5") == (5, "")
        assert server.poll() is None
        other.kill()
    assert server.wait(30) == 0


def test_it_is_told_to_end(vm, connection, server):
    connection.send(b"drop", version(), b"%d" % vm.pid)
    assert connection.receive() == [b"done"]
    assert server.wait(30) == 0


def test_a_child_is_waited_for(name, vm, server):
    with client(name, "wait") as process:
        process.stdout.readline()
        vm.kill()
        vm.wait()
        time.sleep(0.1)
        assert said(name, "exit", "5") == (99, "\n")  # another might stand by now
        process.terminate()
        assert process.wait(30) == 77
    assert server.wait(30) == 0


@pytest.mark.parametrize(
    "message",
    [
        [b""],
        [b"keep"],
        [b"keep", b"another"],
        [b"keep", None],
        [b"keep", None, b"x"],
        [b"keep", None, b"9" * 30],
        [b"restore", None],
        [b"restore", None, b"0,1", b"", b"", b""],
        [b"restore", None, b"-1", b"utf-8:strict", b"", b""],
        [b"restore", None, b"", b"\xff", b"", b""],
    ],
)
def test_nonsense_is_refused(name, server, connection, message):
    connection.send(*[version() if field is None else field for field in message])
    assert connection.receive()[0] == b"no"
    assert said(name, "exit", "5") == (5, "")


@pytest.mark.parametrize("text", [b"", b"\0", b"\xff" * 4, b"\x05\0\0\0ab", b"\0" * 4])
@pytest.mark.parametrize("met", [False, True])
def test_broken_messages(name, server, text, met, monkeypatch):
    monkeypatch.setattr(sys, "prefix", name)
    with connect() as connection:
        inbox = meet(connection) if met else Inbox(connection)
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError, StandbyError):  # nothing more is said
            while (word := inbox.wait().fields[0]) != b"no":
                assert word == b"hello"
    assert said(name, "exit", "5") == (5, "")


def test_files_that_come_too_early_are_refused(name, server, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", name)
    with connect() as connection, (tmp_path / "file").open("w") as file:
        inbox = Inbox(connection)
        send(connection, [b"hello", b"0"], [file.fileno()])
        assert inbox.wait().fields[0] == b"hello"
        assert inbox.wait().fields == [b"no", b"invalid message"]


def test_the_whole_command(name, vm, monkeypatch):
    """`ovr restore` with all of `ovr` loaded: what it says is what it says without."""
    module = (
        f"{NAMED}import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=1)"
    )
    commands = (
        ["restore", "--help"],
        ["restore", "--nonsense"],
        ["restore", "--vm", "lab:-", "-v"],
    )

    def outcomes() -> list[tuple[int, str, str]]:
        found = []
        for command in commands:
            done = subprocess.run(
                [sys.executable, "-c", module, name, "ovr", *command],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            found.append((done.returncode, done.stdout, done.stderr))
        return found

    alone = outcomes()
    started = [sys.executable, "-c", module, name, "ovr.cli.standby", str(vm.pid)]
    # Its standard streams are closed, or this would wait for its end.
    subprocess.run(started, check=True, capture_output=True, timeout=60)
    monkeypatch.setattr(sys, "prefix", name)
    with connect() as asked:
        assert Path("/proc", str(peer_of(asked)[0])).exists()  # who forked it has gone
    helped, wrong, unknown = outcomes()
    assert [helped, wrong] == alone[:2]
    assert (helped[0], wrong[0], unknown[0]) == (0, 2, 2)
    assert "restore: done by the standby process" in unknown[2]
    assert alone[2][2] in unknown[2]
