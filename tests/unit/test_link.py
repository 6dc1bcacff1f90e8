"""Addresses, and what answers there."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr.errors import AgentUnreachable, UsageError
from ovr.guest.client.link import Address, open_link, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("vsock:3", Address("vsock", cid=3)),
        ("vsock:4294967294:5", Address("vsock", cid=4294967294, port=5)),
        ("unix:/run/vm/vsock", Address("unix", path="/run/vm/vsock")),
        ("unix:/run/vm/vsock:77", Address("unix", path="/run/vm/vsock", port=77)),
        ("unix:/run/a:b", Address("unix", path="/run/a:b")),
        ("serial:/run/vm/serial", Address("serial", path="/run/vm/serial")),
        ("serial:a:1", Address("serial", path="a:1")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    ["", "vsock", "vsock:", "vsock:x", "vsock:-3", "vsock:2", "vsock:3:", "vsock:3:x",
     "vsock:3:1:2", "vsock:4294967295", "vsock:99999999999", "vsock:\u0663",
     "unix:", "unix::5", "unix:" + "x" * 108, "unix:a\0b",
     "serial:", "tcp:1:2", "/run/x"],
)  # fmt: skip
def test_no_addresses(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert caught.value.hint


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_an_address_or_a_usage_error(text: str) -> None:
    for prefix in ("", "vsock:", "unix:", "serial:"):
        with suppress(UsageError):
            assert parse_address(str(parse_address(prefix + text))) == parse_address(prefix + text)


@contextmanager
def server(path: Path, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            with listener.accept()[0] as connection, suppress(OSError):
                connection.settimeout(5)
                serve(connection)

        thread = threading.Thread(target=run)
        thread.start()
        yield
        thread.join()


def test_connect_by_line(tmp_path: Path) -> None:
    def serve(connection: socket.socket) -> None:
        assert connection.recv(100) == b"CONNECT 99\n"
        # The first bytes of the stream may come together with the line.
        connection.sendall(b"OK 1073741824\nfirst")
        connection.sendall(connection.recv(100))

    with server(tmp_path / "s", serve), open_link(f"unix:{tmp_path}/s:99", 5) as link:
        deadline = time.monotonic() + 5
        assert link.receive(deadline) == b"first"
        link.send(b"echo", deadline)
        assert link.receive(deadline) == b"echo"
        with pytest.raises(AgentUnreachable, match="hung up"):
            link.receive(deadline)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "does not serve vsock port 687"),
        (b"ERR\n", "CONNECT protocol"),
        (b"x" * 1000, "CONNECT protocol"),
        (b"OK", "does not serve"),
    ],
)
def test_connect_refused(tmp_path: Path, answer: bytes, message: str) -> None:
    def serve(connection: socket.socket) -> None:
        assert connection.recv(100) == b"CONNECT 687\n"
        connection.sendall(answer)

    with server(tmp_path / "s", serve):
        with pytest.raises(AgentUnreachable, match=message) as caught:
            open_link(f"unix:{tmp_path}/s", 5)
        assert caught.value.hint


def test_connect_hangs(tmp_path: Path) -> None:
    slow = server(tmp_path / "s", lambda connection: time.sleep(1))
    with slow, pytest.raises(AgentUnreachable, match="does not answer"):
        open_link(f"unix:{tmp_path}/s", 0.3)


@pytest.mark.parametrize("kind", ["unix", "serial"])
def test_nobody_there(tmp_path: Path, kind: str) -> None:
    with pytest.raises(AgentUnreachable) as caught:
        open_link(f"{kind}:{tmp_path}/none", 1)
    assert "does not exist" in caught.value.hint
    (tmp_path / "file").touch()
    with pytest.raises(AgentUnreachable) as caught:
        open_link(f"{kind}:{tmp_path}/file", 1)
    assert "is not a socket" in caught.value.hint
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/dead")
    with pytest.raises(AgentUnreachable, match="refused") as caught:
        open_link(f"{kind}:{tmp_path}/dead", 1)
    assert caught.value.hint


def test_no_guest_with_that_cid() -> None:
    with pytest.raises(AgentUnreachable) as caught:
        open_link("vsock:4000000000", 2)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_peer_that_takes_nothing(tmp_path: Path) -> None:
    slow = server(tmp_path / "s", lambda connection: time.sleep(1))
    with (
        slow,
        open_link(f"serial:{tmp_path}/s", 5) as link,
        pytest.raises(AgentUnreachable, match="does not read"),
    ):
        link.send(bytes(10_000_000), time.monotonic() + 0.3)


def test_closed_link(tmp_path: Path) -> None:
    with server(tmp_path / "s", lambda connection: None):
        link = open_link(f"serial:{tmp_path}/s", 5)
        link.close()
        with pytest.raises(AgentUnreachable):
            link.receive(time.monotonic() + 1)
        with pytest.raises(AgentUnreachable):
            link.send(b"x", time.monotonic() + 1)
