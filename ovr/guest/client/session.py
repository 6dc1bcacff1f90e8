"""Hold a session with the agent in the guest: greeting, frames, heartbeat."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Self, TypeVar

from ovr.errors import AgentUnreachable
from ovr.guest import protocol
from ovr.guest.client.link import Link, open_link
from ovr.guest.message import Message
from ovr.guest.wire import ProtocolError, decode, encode
from ovr.host.closing import Closing
from ovr.memory.addresses import Gva

__all__ = ["AgentInfo", "Session", "one_line"]

MessageT = TypeVar("MessageT", bound=Message)

_SEND_SECONDS: Final = 60.0
_HEARTBEAT: Final = 0
"""Number in pings that only test whether the agent is alive."""
_HEARTBEAT_SECONDS: Final = 5.0
_DEAD_AFTER: Final = 6
"""Multiple of the timeout: the agent does not read while it kills a tree."""


@dataclass(frozen=True)
class AgentInfo:
    """The agent's description of itself, not trusted before `ovr.attempt.authentication`.

    Attributes:
        protocol: the version of the protocol.
        agent: the agent's own version.
        lab: whether it was built with the lab part.
        kernel: the guest's kernel release.
        criu: the version of the guest's CRIU, None without one.
        pid: the agent's pid.
        page_size: the guest's page size in bytes.
        boot_id: a UUID that changes with every boot of the guest.
        nonce: the agent's nonce for the authentication of this session.
        force_write: the agent can write to pages that their own task cannot write to.
        secret_at: the GVA, in the agent's process, of the page with the secret.
        engines: the installed container engines: podman, runc, crun.
        warm: the size of the pool in bytes, or 0.
        warm_at: the GVA of the pool in its process.
    """

    protocol: int
    agent: str
    lab: bool
    kernel: str
    criu: str | None
    pid: int
    page_size: int
    boot_id: str
    nonce: bytes
    force_write: bool
    secret_at: int
    warm: int
    warm_at: Gva
    engines: tuple[str, ...] = ()


class Session(Closing):
    """One session with an agent: frames and the heartbeat.

    One thread reads; `keep_alive` adds one that only writes.
    """

    def __init__(self, link: Link, timeout: float) -> None:
        self._link = link
        self._timeout = timeout
        self._input = bytearray()
        self._writing = threading.Lock()
        self._pings = 0
        self._token = os.urandom(protocol.TOKEN_SIZE)
        self.hello = self._greet(time.monotonic() + timeout)

    @classmethod
    def connect(cls, address: str, timeout: float = 10.0) -> Self:
        """Open a session, in one attempt.

        Args:
            address: ``vsock:CID[:PORT]``, ``unix:PATH[:PORT]`` or ``serial:PATH``.
            timeout: seconds to wait for an answer, also later; longer steps are waited for as long
                as the agent answers pings.

        Raises:
            UsageError: invalid address.
            AgentUnreachable: no agent answers there, or one with another protocol.
        """
        link = open_link(address, timeout)
        try:
            return cls(link, timeout)
        except BaseException:
            link.close()
            raise

    @property
    def address(self) -> str:
        """The agent's address, in the form of ``--agent``."""
        return str(self._link.address)

    def close(self) -> None:
        """Close the session; the agent kills a tree that is still held."""
        self._link.close()

    def ping(self, timeout: float | None = None) -> None:
        """Wait until the agent has handled all previous messages.

        Raises:
            AgentUnreachable: it does not answer.
        """
        self._pings += 1
        self._send(protocol.Ping(self._pings))
        deadline = self._deadline(timeout)
        while True:
            message = self._receive(deadline)
            if isinstance(message, protocol.Pong) and message.number == self._pings:
                return
            if time.monotonic() >= deadline:
                raise self._broken("no answer to a ping")

    @contextmanager
    def keep_alive(self, interval: float = 1.0) -> Iterator[None]:
        """Run a thread that sends `Alive` to the agent every `interval` seconds."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(interval):
                try:
                    self._send(protocol.Alive())
                except AgentUnreachable:
                    return  # the next read reports it

        thread = threading.Thread(target=beat, name="ovr-keep-alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _deadline(self, timeout: float | None) -> float:
        # Returns `time.monotonic()` seconds.
        return time.monotonic() + (self._timeout if timeout is None else timeout)

    # Greeting ------------------------------------------------------------------------------

    def _greet(self, deadline: float) -> AgentInfo:
        hello = encode(protocol.Hello(protocol.VERSION, self._token))
        if self._link.serial:
            self._synchronise(hello, self._token, deadline)
        else:
            self._link.send(hello, deadline)
        answer = self._expect(protocol.Welcome, deadline)
        if answer.token != self._token or answer.version != protocol.VERSION:
            raise self._broken("an answer to another session's hello")
        if len(answer.nonce) != protocol.NONCE_SIZE:
            raise self._broken(f"a nonce of {len(answer.nonce)} bytes")
        return AgentInfo(
            protocol=answer.version,
            agent=one_line(answer.agent),
            lab=answer.lab_build,
            kernel=one_line(answer.kernel),
            criu=None if answer.criu is None else one_line(answer.criu),
            pid=answer.pid,
            page_size=answer.page_size,
            boot_id=answer.boot_id,
            nonce=answer.nonce,
            force_write=answer.force_write,
            secret_at=answer.secret_at,
            engines=tuple(map(one_line, answer.engines)),
            warm=answer.warm,
            warm_at=Gva(answer.warm_at),
        )

    def _synchronise(self, hello: bytes, token: bytes, deadline: float) -> None:
        """Discard bytes of older sessions, in both directions."""
        marker = protocol.MAGIC + token

        def keep_tail(data: bytes) -> None:
            self._input += data
            found = self._input.find(marker)
            if found < 0:
                del self._input[: -len(marker)]

        start = bytes(protocol.SYNC_ZEROS) + protocol.MAGIC + hello
        # Read while writing: an agent that is blocked on old output would not read our bytes.
        self._link.send(start, deadline, on_input=keep_tail)
        while marker not in self._input:
            keep_tail(self._link.receive(deadline))
        del self._input[: self._input.index(marker) + len(marker)]

    # Frames --------------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        frame = encode(message)
        with self._writing:
            self._link.send(frame, time.monotonic() + _SEND_SECONDS)

    def _receive(self, deadline: float | None) -> Message:
        """Return the next message.

        Args:
            deadline: in `time.monotonic()` seconds; None: wait while the agent answers pings.

        Raises:
            AgentUnreachable: none came, or an invalid one.
        """
        while True:
            while (frame := self._take_frame()) is None:
                self._input += self._link.receive(self._await_input(deadline))
            try:
                message = decode(frame)
            except ProtocolError as error:
                raise self._broken(str(error)) from error
            if not _is_heartbeat(message):
                return message
            if deadline is not None and time.monotonic() >= deadline:
                raise self._broken("only answers to pings")

    def _await_input(self, deadline: float | None) -> float:
        # Returns the deadline for a read. Without a deadline, sends pings until input arrives.
        if deadline is not None:
            return deadline
        dead = time.monotonic() + _DEAD_AFTER * self._timeout
        interval = min(_HEARTBEAT_SECONDS, self._timeout)
        while time.monotonic() < dead and not self._link.readable(interval):
            self._send(protocol.Ping(_HEARTBEAT))
        return time.monotonic()

    def _take_frame(self) -> bytes | None:
        if len(self._input) < 4:
            return None
        size = int.from_bytes(self._input[:4], "big")
        if not 0 < size <= protocol.MAX_FRAME:
            raise self._broken(f"a frame of {size} bytes")
        if len(self._input) < 4 + size:
            return None
        frame = bytes(self._input[4 : 4 + size])
        del self._input[: 4 + size]
        return frame

    def _has_news(self) -> bool:
        """Return whether there is an unread message other than answers to pings."""
        while self._link.readable():
            self._input += self._link.receive(time.monotonic())
        while (frame := self._take_frame()) is not None:
            if not _is_heartbeat(decode(frame)):
                self._input[:0] = len(frame).to_bytes(4, "big") + frame
                break
        return bool(self._input)

    def _expect(self, kind: type[MessageT], deadline: float) -> MessageT:
        """Return the next message; raise unless it is a `kind`."""
        message = self._receive(deadline)
        if isinstance(message, kind):
            return message
        if isinstance(message, protocol.Error):
            error = AgentUnreachable(
                f"the agent at {self._link.address} refused: {one_line(message.text)}",
                "check that ovr on the host and ovr-agent in the guest have the same version",
            )
            error.code = one_line(message.code)
            raise error
        raise self._broken(f"{message.op} instead of {kind.op}")

    def _broken(self, how: str) -> AgentUnreachable:
        self.close()
        return AgentUnreachable(
            f"the agent at {self._link.address} violated the protocol: {how}",
            "check that ovr on the host and ovr-agent in the guest have the same version",
        )


def _is_heartbeat(message: Message) -> bool:
    return isinstance(message, protocol.Pong) and message.number == _HEARTBEAT


def one_line(text: str) -> str:
    """Return untrusted text from the guest as one line of printable characters."""
    return "".join(c if c.isprintable() else "?" for c in text)[:256]
