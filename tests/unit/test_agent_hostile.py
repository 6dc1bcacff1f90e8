"""Input from a hostile host, to an agent built with sanitizers."""

import hmac
import os
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest.mock import patch

import msgpack
import pytest

from ovr.errors import AgentUnreachable, AttemptFailed
from ovr.guest import build, compiler, lab_protocol, move_protocol, protocol
from ovr.guest.compiler import SANITIZED
from ovr.guest.wire import decode, encode, header
from tests.unit.agent_host import IMAGES, AgentHost, agent_host, wait_for

HELLO = encode(protocol.Hello(protocol.VERSION, bytes(protocol.TOKEN_SIZE)))
UPLOAD = (protocol.Files(("a.img",), (b"x",)), protocol.Begin((), 60000, 60000, 2, False))
RESTORE = b"".join(map(encode, UPLOAD))
GUEST = Path(compiler.__file__).parent
SYNC = bytes(protocol.SYNC_ZEROS) + protocol.MAGIC


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sanitized(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An agent with other limits than its own."""
    where = tmp_path_factory.mktemp("small")
    sources = where / "sources"
    shutil.copytree(GUEST, sources, ignore=shutil.ignore_patterns("*.py", "packaging"))
    (sources / "protocol.h").write_text(header())
    limits = {"UPLOAD_SILENCE_MS": 2000, "MAX_IMAGE_BYTES": 1 << 20, "MAX_FILES": 20}
    for name, value in limits.items():
        found = 0
        for path in sources.glob("*.[ch]"):
            line = rf"(?m)^#define {name} \d+"
            new, count = re.subn(line, f"#define {name} {value}", path.read_text())
            path.write_text(new)
            found += count
        assert found == 1, name
    changed = (sources / "protocol.h").read_text()
    with patch.multiple(compiler, _SOURCES=sources, header=lambda: changed):
        return sanitized(where)


def sanitized(cache: Path) -> Path:
    """Build an agent with sanitizers; without optimization, which takes most of a build's time."""
    # Valgrind and AddressSanitizer get into each other's way.
    flags = ("-O1",) if os.environ.get("OVR_VALGRIND") else (*SANITIZED, "-O0")
    with patch.dict(os.environ, XDG_CACHE_HOME=str(cache)):
        return build(lab=True, flags=flags)


@pytest.fixture
def host(tmp_path: Path, binary: Path) -> Iterator[AgentHost]:
    with agent_host(tmp_path, binary) as host:
        yield host


def secret_of(host: AgentHost) -> bytes:
    with host.connect() as agent:
        return host.secret(agent.hello.secret_at)


def frame(content: object) -> bytes:
    return raw(msgpack.packb(content))


def raw(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def prove(host: AgentHost, connection: socket.socket, *, serial: bool = False) -> None:
    """Say hello, and give the proof of somebody who can read the agent's memory."""
    welcome = greet(connection, serial=serial)
    connection.sendall(encode(proof(host.secret(welcome.secret_at), welcome.nonce)))
    (size,) = connection.recv(4, socket.MSG_WAITALL)[3:]
    assert isinstance(decode(connection.recv(size, socket.MSG_WAITALL)), protocol.Proved)


def greet(connection: socket.socket, *, serial: bool = False) -> protocol.Welcome:
    """Say hello, and return the answer."""
    connection.sendall((SYNC if serial else b"") + HELLO)
    marker = protocol.MAGIC + bytes(protocol.TOKEN_SIZE)
    if serial:
        assert connection.recv(len(marker), socket.MSG_WAITALL) == marker
    size = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
    welcome = decode(connection.recv(size, socket.MSG_WAITALL))
    assert isinstance(welcome, protocol.Welcome)
    return welcome


def proof(secret: bytes, nonce: bytes, side: bytes = protocol.PROOF_OF_HOST) -> protocol.Prove:
    text = protocol.proof_text(side, bytes(protocol.TOKEN_SIZE), nonce)
    return protocol.Prove(hmac.digest(secret, text, "sha256"))


def send(host: AgentHost, data: bytes, *, serial: bool = False, proven: bool = False) -> bytes:
    """Return the agent's answer, up to its error, or until it hangs up."""
    answer = b""
    with host.socket(serial=serial) as connection, suppress(OSError):
        if proven:
            prove(host, connection, serial=serial)
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
        encode(lab_protocol.Put(str(host.directory / "put"), 0o600)),
        encode(lab_protocol.Data(b"data")),
        encode(lab_protocol.Get("/proc/self/comm")),
        encode(lab_protocol.Stdin(b"data")),
        encode(protocol.Go()),
        encode(protocol.Abort()),
        encode(protocol.Alive()),
    ]
    for _ in range(400):
        session = bytearray(b"".join(source.choices(good, k=source.randrange(1, 6))))
        for _ in range(source.randrange(0, 4)):
            session[source.randrange(len(session))] = source.randrange(256)
        send_only(host, bytes(session), proven=True)
    with host.connect() as agent:
        agent.ping()
    assert not host.restores


def send_only(host: AgentHost, data: bytes, *, serial: bool = False, proven: bool = False) -> None:
    """Say it and hang up."""
    with host.socket(serial=serial) as connection, suppress(OSError):
        if proven:
            prove(host, connection, serial=serial)
        connection.sendall(data)


@pytest.mark.parametrize("cut", [1, 5, 50, 3000])
def test_serial_line_with_remains_of_a_dead_host(host: AgentHost, cut: int) -> None:
    # One connection all the time, as when the agent does not see the host change.
    with host.socket(serial=True) as connection:
        prove(host, connection, serial=True)
        files = encode(protocol.Files(("a.img",), (b"x" * 100_000,)))
        connection.sendall(files + files[:-cut])
        wait_for(lambda: host.restores)
        token = b"second session.."
        connection.sendall(SYNC + encode(protocol.Hello(protocol.VERSION, token)))
        receive_until(connection, protocol.MAGIC + token)
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


def test_who_cannot_read_its_memory_gets_no_restore(host: AgentHost) -> None:
    secret = secret_of(host)
    for _ in range(2):  # each time with another nonce
        for what in ("nothing", "short", "long", "wrong", "nonce", "side", "secret itself"):
            with host.socket() as connection:
                nonce = greet(connection).nonce
                right = proof(secret, nonce).proof
                guess = {
                    "nothing": b"", "short": right[:-1], "long": right + b"x",
                    "wrong": bytes([right[0] ^ 1]) + right[1:],
                    "nonce": proof(secret, bytes(protocol.NONCE_SIZE)).proof,
                    "side": proof(secret, nonce, protocol.PROOF_OF_AGENT).proof,
                    "secret itself": secret,
                }[what]  # fmt: skip
                connection.sendall(encode(protocol.Prove(guess)) + RESTORE)
                answer = receive_until(connection, b"authentication failed")
                assert b"error" in answer, what
    touch = protocol.Touch((1, 1, 1), (0, 4096))
    move = "0" * move_protocol.MOVE_ID
    about_moves = (
        move_protocol.Prepare(move), move_protocol.Adopt(move), move_protocol.Moved(move),
        move_protocol.Doubts(), move_protocol.Archive(),
    )  # fmt: skip
    others = (protocol.Go(), protocol.Abort(), touch, protocol.Config())
    for message in (*UPLOAD, *others, *about_moves):
        for serial in (False, True):
            start = SYNC if serial else b""
            answer = send(host, start + HELLO + encode(message), serial=serial)
            assert b"unproven" in answer, message
    # The next session on the same line begins anew.
    with host.socket(serial=True) as connection:
        prove(host, connection, serial=True)
        connection.sendall(SYNC + HELLO + RESTORE)
        receive_until(connection, b"unproven")
    assert not host.restores


def test_the_secret_is_another_one_each_time(tmp_path: Path, binary: Path) -> None:
    found = set()
    for name in "ab":
        (tmp_path / name).mkdir()
        with agent_host(tmp_path / name, binary) as host:
            found.add(secret_of(host))
    assert len(found) == 2
    assert bytes(protocol.SECRET_SIZE) not in found


def test_an_upload_that_has_no_end(tmp_path: Path, small: Path) -> None:
    """More bytes, and more files, than an image set has: the agent says the limit and hangs up."""
    with agent_host(tmp_path, small) as host:
        piece = encode(protocol.Files(("a.img",), (bytes(100_000),)))
        answer = send(host, 50 * piece, proven=True)
        assert b"cannot store image files: more than 1048576 bytes in all" in answer
        many = [encode(protocol.Files((f"{n}.img",), (b"",))) for n in range(21)]
        assert b"more than 20 files" in send(host, b"".join(many), proven=True)
        wait_for(lambda: not host.restores)
        with host.connect() as agent:
            agent.begin(dict.fromkeys(map(str, range(20)), b"x"), criu_options=host.criu_options())
            agent.abort()


def test_memory_stays_bounded(host: AgentHost) -> None:
    """Frames without end, from as many hosts as there can be at once, of which none reads."""
    ping = encode(protocol.Ping(1)) * 5000
    half = (protocol.MAX_FRAME).to_bytes(4, "big") + bytes(protocol.MAX_FRAME - 1)
    before = resident(host)
    with ExitStack() as stack:
        for number in range(16):
            connection = stack.enter_context(host.socket())
            prove(host, connection)
            connection.setblocking(False)
            with suppress(OSError):
                connection.sendall(half if number % 2 else ping)
            with suppress(OSError):
                for _ in range(50):
                    connection.sendall(ping)
        assert resident(host) - before < 64 << 20  # 16 times 1.3 MiB, and what sanitizers keep
    wait_for(lambda: has_room(host))  # it reads what they have sent before it sees that they left


def test_silent_upload(tmp_path: Path, small: Path) -> None:
    with agent_host(tmp_path, small) as host, host.connect() as agent:
        agent._send(protocol.Files(("a.img",), (b"x",)))
        message = agent._receive(time.monotonic() + 30)
        assert isinstance(message, protocol.Aborted)
        assert (message.reason, message.undone) == ("the host was silent for too long", True)
        assert not host.restores
        agent.ping()


@pytest.mark.parametrize("name", ["core-1.img", "dangling.img"])
def test_links_in_the_way(host: AgentHost, name: str) -> None:
    """Root of the guest puts links where image files would go: nothing is written through them."""
    victim = host.directory / "victim"
    victim.write_bytes(b"untouched")
    with host.connect() as agent:
        agent._send(protocol.Files(("first.img",), (b"x",)))
        wait_for(lambda: any((made / "images").is_dir() for made in host.restores))
        (directory,) = host.restores
        (directory / "images" / "core-1.img").symlink_to(victim)
        (directory / "images" / "dangling.img").symlink_to(host.directory / "made")
        with pytest.raises(AttemptFailed, match=r"cannot store image files: .*symbolic links"):
            agent.begin({name: b"overwritten"}, criu_options=host.criu_options())
    wait_for(lambda: not host.restores)
    assert victim.read_bytes() == b"untouched"
    assert not (host.directory / "made").exists()


def test_a_link_in_the_place_of_the_directory(tmp_path: Path, binary: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "restore-1").mkdir(parents=True)
    (elsewhere / "restore-1" / "file").touch()
    (tmp_path / "run").symlink_to(elsewhere)
    with pytest.raises(AssertionError), agent_host(tmp_path, binary):
        pass
    assert (elsewhere / "restore-1" / "file").exists()


def test_links_among_what_is_left_over(tmp_path: Path, binary: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    left = tmp_path / "run" / "restore-1"
    left.mkdir(parents=True)
    (left / "images").symlink_to(outside)
    (tmp_path / "run" / "restore-2").symlink_to(outside)
    with agent_host(tmp_path, binary):
        assert (outside / "file").exists()
        assert not left.exists()


def test_a_directory_whose_name_is_too_long(tmp_path: Path, binary: Path) -> None:
    done = subprocess.run([binary, "--dir", "/" + "x" * 81], capture_output=True, check=False)
    assert done.returncode == 2


def has_room(host: AgentHost) -> bool:
    """Whether the agent takes one more session."""
    try:
        with host.connect() as agent:
            agent.ping()
    except AgentUnreachable:
        return False
    return True


def resident(host: AgentHost) -> int:
    """Bytes of memory that the agent has."""
    status = Path(f"/proc/{host.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]


def receive_until(connection: socket.socket, needle: bytes) -> bytes:
    answer = b""
    while needle not in answer:
        piece = connection.recv(1 << 16)
        assert piece, answer
        answer += piece
    return answer
