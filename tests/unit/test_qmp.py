"""The QMP client against well-behaved and hostile peers."""

import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from ovr.errors import VmUnreachable
from ovr.vm.qmp import ExecuteError, Qmp

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
READY = b'{"return": {}, "id": 1}\r\n'


class Peer:
    """Listens at a path and plays a script: bytes are sent, numbers slept, None reads a line."""

    def __init__(self, path, *script):
        self.path = path
        self.heard = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._play, args=(script,), daemon=True)
        self._thread.start()

    def _play(self, script):
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rb") as lines:
            for step in script:
                if step is None:
                    self.heard.append(json.loads(lines.readline()))
                elif isinstance(step, bytes):
                    try:
                        connection.sendall(step)
                    except OSError:
                        return
                else:
                    time.sleep(step)

    def close(self):
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def peer(tmp_path):
    peers = []

    def start(*script):
        peers.append(Peer(tmp_path / "qmp", *script))
        return peers[-1]

    yield start
    for one in peers:
        one.close()


def ready(*script):
    return GREETING, None, READY, None, *script


def ask(peer, timeout=2.0):
    with Qmp.connect(peer.path, timeout) as qmp:
        return qmp.execute("query-status")


def test_command_and_answer(peer):
    one = peer(*ready(b'{"return": {"status": "paused"}, "id": 2}\r\n'))
    with Qmp.connect(one.path, 2) as qmp:
        assert qmp.status() == "paused"
        assert qmp.qemu_pid == os.getpid()
        assert qmp.fileno() >= 0
    assert [command["execute"] for command in one.heard] == ["qmp_capabilities", "query-status"]


def test_human_command_and_names_of_arguments(peer):
    one = peer(*ready(b'{"return": "text\\r\\n", "id": 2}\r\n'))
    with Qmp.connect(one.path, 2) as qmp:
        assert qmp.human("info mtree -f") == "text\r\n"
    assert one.heard[1]["arguments"] == {"command-line": "info mtree -f"}


def test_events_count_and_are_never_taken_for_answers(peer):
    event = b'{"event": "RESET", "timestamp": {}}\r\n'
    stop = b'{"event": "STOP", "timestamp": {}}\r\n'
    one = peer(GREETING, event, None, stop + READY, None, event, b'{"return": 5, "id": 2}\n', 1)
    with Qmp.connect(one.path, 2) as qmp:
        assert qmp.execute("x") == 5
        assert qmp.resets() == 2


def test_answers_in_pieces(peer):
    answer = b'{"return": [1, 2], "id": 2}\r\n'
    pieces = [answer[at : at + 1] for at in range(len(answer))]
    assert ask(peer(*ready(*pieces))) == [1, 2]


def test_refused_command(peer):
    error = b'{"error": {"class": "CommandNotFound", "desc": "no such thing"}, "id": 2}\r\n'
    with pytest.raises(ExecuteError, match="no such thing") as caught:
        ask(peer(*ready(error)))
    assert caught.value.error_class == "CommandNotFound"
    assert caught.value.desc == "no such thing"


def test_late_answer_is_not_the_next_one(peer):
    one = peer(*ready(0.3, b'{"return": "late", "id": 2}\n', None, b'{"return": "new", "id": 3}\n'))
    with Qmp.connect(one.path, 0.2) as qmp:
        with pytest.raises(VmUnreachable, match=r"within 0\.2 s"):
            qmp.execute("slow")
        time.sleep(0.3)
        assert qmp.execute("fast") == "new"


@pytest.mark.parametrize(
    "script",
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n",),
        (b"[1, 2]\r\n",),
        (b'{"QMP": 1}\r\n',),
        (b"\xff\xfe\n",),
        (b"[" * 100_000 + b"\n",),
        (b"",),
        (b'{"QMP"',),
        (GREETING, None),
        ready(),
        ready(b'{"return": {}, "id": 3'),
        ready(b'{"id": 2}\n'),
        ready(b'{"error": "text", "id": 2}\n'),
        ready(b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n'),
        ready(b"null\n"),
    ],
)
def test_nonsense_and_hanging_up(peer, script):
    with pytest.raises(VmUnreachable) as caught:
        ask(peer(*script))
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_silence(peer):
    with pytest.raises(VmUnreachable, match=r"within 0\.2 s"):
        ask(peer(1.0), timeout=0.2)


def test_a_byte_now_and_then_does_not_hold_us(peer):
    drops = [step for _ in range(600) for step in (b" ", 0.05)]
    start = time.monotonic()
    with pytest.raises(VmUnreachable, match="within"):
        ask(peer(*drops), timeout=0.3)
    assert time.monotonic() - start < 15  # all of them take 30


def test_endless_line(peer):
    with pytest.raises(VmUnreachable, match="without end"):
        ask(peer(*[b"x" * (1 << 20)] * 20), timeout=10)


def test_nobody_there(tmp_path):
    with pytest.raises(VmUnreachable, match="No such file") as caught:
        Qmp.connect(tmp_path / "none")
    assert caught.value.exit_code == 3
    (tmp_path / "file").touch()
    with pytest.raises(VmUnreachable, match="refused"):
        Qmp.connect(tmp_path / "file")
    with pytest.raises(VmUnreachable, match="too long"):
        Qmp.connect("/" + "x" * 200)


def test_status_that_is_none(peer):
    with (
        Qmp.connect(peer(*ready(b'{"return": 5, "id": 2}\n')).path, 2) as qmp,
        pytest.raises(VmUnreachable),
    ):
        qmp.status()


def test_resets_are_heard_without_waiting(peer):
    """In time, whatever stands before them; and half a message is waited for by nobody."""
    reset = b'{"event": "RESET", "data": {"guest": false}}\r\n'
    late = b'{"return": {}, "id": 77}\r\n'
    one = peer(*ready(b'{"return": 5, "id": 2}\r\n' + late + reset + reset + reset[:9]), 3)
    with Qmp.connect(one.path, 20) as qmp:
        assert qmp.execute("query-status") == 5
        deadline = time.monotonic() + 10
        while qmp.resets() < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        start = time.monotonic()
        assert qmp.resets() == 2
        assert time.monotonic() - start < 10  # less than it waits for an answer


def test_a_qemu_that_is_gone_when_it_is_asked_for_resets(peer):
    one = peer(*ready(b'{"return": 5, "id": 2}\r\n'))
    with Qmp.connect(one.path, 20) as qmp:
        assert qmp.execute("query-status") == 5
        one.close()
        with pytest.raises(VmUnreachable, match="closed the connection"):
            qmp.resets()


@contextmanager
def flood(path, data):
    """A process that greets, takes commands as QEMU does, then sends `data` without end."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        pid = os.fork()
        if not pid:
            with suppress(BaseException):
                connection, _ = listener.accept()
                connection.sendall(GREETING)
                connection.recv(4096)
                connection.sendall(READY)
                while True:
                    connection.sendall(data)
            os._exit(0)
    yield
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("line", [b'{"event": "RESET"}\n', b'{"event": "X", "data": "', b"x"])
def test_announcements_without_end(tmp_path, line):
    """They are asked for while the VM is held: no peer may keep us there, or fill our memory."""
    with (
        flood(tmp_path / "qmp", line * ((1 << 20) // len(line))),
        Qmp.connect(tmp_path / "qmp", 20) as qmp,
        pytest.raises(VmUnreachable, match="without end"),
    ):
        for _ in range(100_000):  # where it sends more slowly than we read
            qmp.resets()
