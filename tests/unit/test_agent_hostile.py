"""Bytes that no honest host sends, to an agent built with sanitizers."""

import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgpack
import pytest

from ovr.guest import build, protocol
from ovr.guest.wire import encode
from tests.unit.agent_host import IMAGES, SANITIZED, AgentHost, agent_host, wait_for

HELLO = encode(protocol.Hello(protocol.VERSION, bytes(protocol.TOKEN_SIZE)))
SYNC = bytes(protocol.SYNC_ZEROS) + protocol.MAGIC


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("agent") / "ovr-agent"
    return build(lab=True, output=where, flags=SANITIZED)


@pytest.fixture
def host(tmp_path: Path, binary: Path) -> Iterator[AgentHost]:
    with agent_host(tmp_path, binary) as host:
        yield host


def frame(content: object) -> bytes:
    return raw(msgpack.packb(content))


def raw(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def send(host: AgentHost, data: bytes, *, serial: bool = False) -> bytes:
    """What the agent says to it, until it hangs up or falls silent."""
    answer = b""
    with host.socket(serial=serial) as connection, suppress(OSError):
        connection.settimeout(0.3)
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        while b"error" not in answer and (piece := connection.recv(1 << 16)):
            answer += piece
    return answer


BAD = {
    "empty frame": bytes(4),
    "huge frame": b"\xff\xff\xff\xff" + b"x" * 100,
    "one more than allowed": (protocol.MAX_FRAME + 1).to_bytes(4, "big"),
    "no msgpack": raw(b"\xc1"),
    "truncated msgpack": raw(b"\x81\xa2"),
    "no map": frame([1, 2]),
    "no op": frame({"version": 1}),
    "unknown op": frame({"op": "reboot"}),
    "op of another type": frame({"op": 7}),
    "key of another type": frame({"op": "ping", 7: 7}),
    "unknown field": frame({"op": "ping", "number": 1, "colour": 1}),
    "missing field": frame({"op": "ping"}),
    "field of another type": frame({"op": "ping", "number": "1"}),
    "negative number": frame({"op": "ping", "number": -1}),
    "nested": frame({"op": "files", "names": [["a"]], "data": [b""]}),
    "map in a field": frame({"op": "ping", "number": {"a": 1}}),
    "a lie about a list": raw(b"\x82\xa2op\xa5files\xa5names\xdd\xff\xff\xff\xff"),
    "a lie about a map": raw(b"\xdf\xff\xff\xff\xff"),
    "a lie about a string": raw(b"\x81\xdb\xff\xff\xff\xff"),
    "repeated field": raw(b"\x83\xa2op\xa4ping\xa6number\x01\xa6number\x01"),
    "repeated op": raw(b"\x82\xa2op\xa2go\xa2op\xa2go"),
    "trailing bytes": raw(b"\x81\xa2op\xa2go\0"),
    "a string with NUL": frame({"op": "get", "path": "a\0b"}),
    "a string too long": frame({"op": "get", "path": "a" * 4096}),
    "an answer": frame({"op": "pong", "number": 1}),
    "second hello": HELLO,
    "only names": frame({"op": "files", "names": ["a", "b"], "data": [b""]}),
}


@pytest.mark.parametrize("serial", [False, True], ids=["stream", "serial"])
def test_bad_frames(host: AgentHost, serial: bool) -> None:
    start = SYNC if serial else b""
    for what, data in BAD.items():
        assert b"error" in send(host, start + HELLO + data, serial=serial), what
        if what != "second hello":
            assert b"error" in send(host, start + data, serial=serial), what
    with host.connect(serial=serial) as agent:
        agent.ping()


def test_wrong_version(host: AgentHost) -> None:
    answer = send(host, encode(protocol.Hello(protocol.VERSION + 1, bytes(16))))
    assert b"speaks version" in answer


def test_random_bytes(host: AgentHost) -> None:
    source = random.Random(1)
    for _ in range(150):
        noise = source.randbytes(source.randrange(1, 3000))
        send_only(host, noise)
        send_only(host, HELLO + len(noise).to_bytes(4, "big") + noise)
        send_only(host, SYNC + HELLO + noise, serial=True)
    with host.connect() as agent, host.connect(serial=True) as other:
        agent.ping()
        other.ping()


def test_mutated_frames(host: AgentHost) -> None:
    source = random.Random(2)
    good = [
        encode(protocol.Files(("a.img", "b.img"), (b"x" * 100, b""))),
        encode(protocol.Ping(7)),
        encode(protocol.Put(str(host.directory / "put"), 0o600)),
        encode(protocol.Data(b"data")),
        encode(protocol.Get("/proc/self/comm")),
        encode(protocol.Stdin(b"data")),
        encode(protocol.Go()),
        encode(protocol.Abort()),
        encode(protocol.Alive()),
    ]
    for _ in range(400):
        session = bytearray(b"".join(source.choices(good, k=source.randrange(1, 6))))
        for _ in range(source.randrange(0, 4)):
            session[source.randrange(len(session))] = source.randrange(256)
        send_only(host, HELLO + session)
    with host.connect() as agent:
        agent.ping()
    assert not host.restores


def send_only(host: AgentHost, data: bytes, *, serial: bool = False) -> None:
    """Say it and hang up."""
    with host.socket(serial=serial) as connection, suppress(OSError):
        connection.sendall(data)


@pytest.mark.parametrize("cut", [1, 5, 50, 3000])
def test_serial_line_with_remains_of_a_dead_host(host: AgentHost, cut: int) -> None:
    # One connection all the time, as when the agent does not see the host change.
    with host.socket(serial=True) as connection:
        connection.sendall(SYNC + HELLO)
        files = encode(protocol.Files(("a.img",), (b"x" * 100_000,)))
        connection.sendall(files + files[:-cut])
        answer = receive_until(connection, b"boot_id")
        assert answer.startswith(protocol.MAGIC + bytes(16))
        wait_for(lambda: host.restores)
        token = b"second session.."
        connection.sendall(SYNC + encode(protocol.Hello(protocol.VERSION, token)))
        answer = receive_until(connection, protocol.MAGIC + token)
        connection.sendall(encode(protocol.Ping(5)))
        receive_until(connection, b"pong")
    assert not host.restores


def test_sync_inside_a_frame_is_only_data(host: AgentHost) -> None:
    # Contents are hostile: they must not be able to start a session.
    content = bytes(protocol.CHUNK - 500) + protocol.MAGIC + HELLO
    images = {**IMAGES, "evil.img": content, "more.img": bytes(200_000)}
    with host.connect(serial=True) as agent:
        agent.begin(images, criu_options=host.criu_options())
        (directory,) = host.restores
        assert (directory / "images" / "evil.img").read_bytes() == content
        agent.abort()


def test_restore_under_sanitizers(host: AgentHost) -> None:
    for serial in (False, True):
        with host.connect(serial=serial) as agent:
            agent.begin(IMAGES, criu_options=host.criu_options())
            agent.abort()
            agent.run(["cat"], input=bytes(1_000_000))


def test_more_sessions_than_there_is_room_for(host: AgentHost) -> None:
    sessions = [host.socket() for _ in range(40)]
    for connection in sessions:
        connection.close()
    with host.connect() as agent:
        agent.ping()


def test_host_that_does_not_read(host: AgentHost) -> None:
    with host.socket() as connection:
        connection.sendall(HELLO)
        with suppress(TimeoutError):
            connection.settimeout(1)
            for _ in range(200_000):
                connection.sendall(encode(protocol.Ping(1)) * 10)
        with host.connect() as agent:
            agent.ping()


def receive_until(connection: socket.socket, needle: bytes) -> bytes:
    answer = b""
    while needle not in answer:
        piece = connection.recv(1 << 16)
        assert piece, answer
        answer += piece
    return answer
