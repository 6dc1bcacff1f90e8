"""Open byte streams from the host to the agent in the guest.

============================  =================================================================
``vsock:CID[:PORT]``          AF_VSOCK of the host's own kernel (vhost-vsock)
``unix:PATH[:PORT]``          the socket of vhost-device-vsock, Firecracker and Cloud Hypervisor:
                              ``CONNECT port``, then ``OK …``, then the stream
``serial:PATH``               the Unix socket chardev of a virtio-serial port
============================  =================================================================
"""

import contextlib
import select
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ovr.errors import AgentUnreachable, UsageError
from ovr.guest.protocol import VSOCK_PORT
from ovr.host.closing import Closing

__all__ = ["DEFAULT_PORT", "Address", "Link", "open_link", "parse_address"]

DEFAULT_PORT = VSOCK_PORT
_FORMS = "vsock:CID[:PORT], unix:PATH[:PORT] or serial:PATH"
_MAX_CONNECT_ANSWER = 64
_RECEIVE_SIZE = 1 << 20


@dataclass(frozen=True)
class Address:
    """The address of an agent.

    Attributes:
        kind: the transport.
        cid: the guest's context id (vsock).
        path: the socket's path (unix, serial).
        port: the agent's vsock port (vsock, unix).
    """

    kind: Literal["vsock", "unix", "serial"]
    cid: int = 0
    path: str = ""
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        if self.kind == "vsock":
            return f"vsock:{self.cid}:{self.port}"
        return f"unix:{self.path}:{self.port}" if self.kind == "unix" else f"serial:{self.path}"


def parse_address(text: str) -> Address:
    """Parse the address of an agent.

    Raises:
        UsageError: invalid address.
    """
    kind, colon, rest = text.partition(":")
    if not colon or not rest or kind not in ("vsock", "unix", "serial"):
        raise UsageError(f"not an agent address: {text!r}", f"use {_FORMS}")
    if kind == "serial":
        return Address("serial", path=_path(rest))
    if kind == "unix":
        path, colon, port = rest.rpartition(":")
        if colon and port.isdecimal():
            return Address("unix", path=_path(path), port=_number(port, "vsock port"))
        return Address("unix", path=_path(rest))
    cid, colon, port = rest.partition(":")
    number = _number(cid, "vsock CID")
    # 0 … 2 are the hypervisor, loopback and the host itself (linux/vm_sockets.h).
    if number < 3:
        raise UsageError(f"vsock CID {number} is not a guest", "guests have CIDs from 3 on")
    return Address("vsock", cid=number, port=_number(port, "vsock port") if colon else DEFAULT_PORT)


def _path(text: str) -> str:
    # sockaddr_un holds 108 bytes with the final NUL.
    if not text or "\0" in text or len(text.encode()) > 107:
        raise UsageError(f"not a socket path: {text!r}", "a Unix socket's path has 1 to 107 bytes")
    return text


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) < 0xFFFFFFFF):
        raise UsageError(f"not a {what}: {text!r}", f"use {_FORMS}")
    return int(text)


class Link(Closing):
    """A connected stream; a context manager.

    Only one thread may read; the caller serialises writes.

    Attributes:
        address: the address of the agent.
        serial: whether sessions on it must synchronise first (`ovr.guest.protocol`).
    """

    def __init__(self, address: Address, connection: socket.socket) -> None:
        self.address = address
        self.serial = address.kind == "serial"
        self._socket = connection
        self._socket.setblocking(False)

    def close(self) -> None:
        """Close the connection; the agent sees a broken link."""
        # Not only close: another thread may still hold the descriptor in poll.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def readable(self, seconds: float = 0.0) -> bool:
        """Return whether data can be read now, or within `seconds`."""
        return bool(self._wait(select.POLLIN, time.monotonic() + seconds))

    def receive(self, deadline: float) -> bytes:
        """Return at least one byte.

        Args:
            deadline: in `time.monotonic()` seconds.

        Raises:
            AgentUnreachable: the link broke, or the deadline passed.
        """
        if not self._wait(select.POLLIN, deadline):
            raise self._lost("does not answer")
        try:
            data = self._socket.recv(_RECEIVE_SIZE)
        except OSError as error:
            raise self._lost(f"broke: {error.strerror}") from error
        if not data:
            raise self._lost("hung up")
        return data

    def send(
        self,
        data: bytes,
        deadline: float,
        *,
        on_input: Callable[[bytes], None] | None = None,
    ) -> None:
        """Send all of `data`.

        Args:
            data: the bytes.
            deadline: in `time.monotonic()` seconds.
            on_input: called with bytes received meanwhile; without it nothing is read.

        Raises:
            AgentUnreachable: the link broke, or the agent did not read all of it in time.
        """
        rest = memoryview(data)
        wanted = select.POLLOUT | (select.POLLIN if on_input else 0)
        while rest:
            events = self._wait(wanted, deadline)
            if not events:
                raise self._lost("is blocked: the agent does not read")
            if on_input and events & select.POLLIN:
                on_input(self.receive(deadline))
            elif events & ~select.POLLIN:
                rest = rest[self._send_some(rest) :]

    def _send_some(self, rest: memoryview) -> int:
        try:
            return self._socket.send(rest)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lost(f"broke: {error.strerror}") from error

    def _wait(self, events: int, deadline: float) -> int:
        """Return the poll events that occur before the deadline, else 0."""
        poll = select.poll()
        try:
            poll.register(self._socket, events)
        except (OSError, ValueError) as error:
            raise self._lost("was closed") from error
        left = max(0.0, deadline - time.monotonic())
        found = poll.poll(left * 1000)
        return found[0][1] if found else 0

    def _lost(self, what: str) -> AgentUnreachable:
        return AgentUnreachable(f"the link to the agent at {self.address} {what}", _hint(self))


def _hint(link: Link) -> str:
    if link.serial:
        return "check that ovr-agent runs in the guest and no other client uses this chardev"
    return "check that ovr-agent runs in the guest and serves this port"


def open_link(address: str, timeout: float) -> Link:
    """Connect to the agent's transport, in one attempt.

    Args:
        address: as in `parse_address`.
        timeout: in seconds.

    Raises:
        UsageError: invalid address.
        AgentUnreachable: the connection failed.
    """
    where = parse_address(address)
    deadline = time.monotonic() + timeout
    try:
        connection = _connect(where, deadline)
    except TimeoutError as error:
        raise AgentUnreachable(f"{where} does not answer", _advice(where)) from error
    except OSError as error:
        raise AgentUnreachable(
            f"cannot connect to {where}: {error.strerror or error}", _advice(where)
        ) from error
    return Link(where, connection)


def _connect(where: Address, deadline: float) -> socket.socket:
    family = socket.AF_VSOCK if where.kind == "vsock" else socket.AF_UNIX
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        connection.connect((where.cid, where.port) if where.kind == "vsock" else where.path)
        if where.kind == "unix":
            _ask_for_port(connection, where.port, deadline)
    except BaseException:
        connection.close()
        raise
    return connection


def _ask_for_port(connection: socket.socket, port: int, deadline: float) -> None:
    answer = bytearray()
    try:
        connection.sendall(b"CONNECT %d\n" % port)
        # Byte by byte, because bytes after the line belong to the stream.
        while not answer.endswith(b"\n") and len(answer) <= _MAX_CONNECT_ANSWER:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            byte = connection.recv(1)
            if not byte:
                raise ConnectionResetError
            answer += byte
    except (BrokenPipeError, ConnectionResetError) as error:
        # The device closes the connection without a reason.
        raise ConnectionRefusedError(0, f"the guest does not serve vsock port {port}") from error
    if not answer.startswith(b"OK "):
        raise ConnectionAbortedError(0, "the socket does not have the CONNECT protocol")


def _advice(where: Address) -> str:
    if where.kind == "vsock":
        if not Path("/dev/vsock").exists():
            return "the host has no vsock: modprobe vhost_vsock"
        return f"check that the VM has a vsock device with guest-cid={where.cid} and runs ovr-agent"
    try:
        is_socket = stat.S_ISSOCK(Path(where.path).stat().st_mode)
    except OSError:
        return f"{where.path} does not exist: check that the VM runs and has this socket"
    if not is_socket:
        return f"{where.path} is not a socket"
    return "check that the VM runs, and ovr-agent in it, and that this is the right socket"
