"""A peer of the host's side that says what a test has it say."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgpack

from ovr.guest import protocol, wire
from ovr.guest.client.link import Address, Link
from ovr.guest.message import Message

WELCOME: dict[str, Any] = {
    "op": "welcome",
    "version": protocol.VERSION,
    "agent": "0",
    "lab_build": True,
    "kernel": "6",
    "pid": 1,
    "page_size": 4096,
    "boot_id": "x",
    "nonce": bytes(protocol.NONCE_SIZE),
    "force_write": True,
    "secret_at": 1 << 40,
    "engines": [],
    "warm": 0,
    "warm_at": 0,
}


def frame(content: object) -> bytes:
    body: bytes = msgpack.packb(content)
    return len(body).to_bytes(4, "big") + body


def read_message(connection: socket.socket) -> Message:
    head = connection.recv(4, socket.MSG_WAITALL)
    return wire.decode(connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))


@contextmanager
def peer(script: Callable[[socket.socket], None], *, greet: bool = True) -> Iterator[Link]:
    """A link to an agent that does what `script` says, after a proper greeting."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)

    def play() -> None:
        with theirs, suppress(OSError, wire.ProtocolError):
            if greet:
                hello = read_message(theirs)
                assert isinstance(hello, protocol.Hello)
                theirs.sendall(frame({**WELCOME, "token": hello.token}))
            script(theirs)
            while theirs.recv(1 << 16):
                pass

    thread = threading.Thread(target=play)
    thread.start()
    with Link(Address("unix", path="fake"), ours) as link:
        yield link
    thread.join()


def replying(*answers: bytes) -> Callable[[socket.socket], None]:
    """Answer each message with the next bytes."""

    def script(connection: socket.socket) -> None:
        for answer in answers:
            read_message(connection)
            connection.sendall(answer)

    return script
