"""A client of the standby process, until it has its answer or a child works for it."""

import socket
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from typing import Final

from ovr.standby.messages import Inbox, Message, StandbyError, send
from ovr.standby.peer import rights
from ovr.standby.proof import Peer

__all__ = ["Talk", "Visit", "welcome"]

Talk = Generator[None, Message, None]
"""A conversation, resumed with each received message."""

_PATIENCE: Final = 5.0  # seconds, for all of it; other clients do not wait for it


class Visit:
    """A non-blocking connection.

    Args:
        connection: just accepted; the visit closes it.
        talk: the conversation to have.

    Attributes:
        peer: the process at the other end.
        connection: to it; None once a child works for it.
        deadline: of time.monotonic, by which the conversation must end.

    Raises:
        StandbyError: it is another user's, or of another pid namespace.
        OSError: it has ended.
    """

    def __init__(self, connection: socket.socket, talk: Callable[["Visit"], Talk]) -> None:
        connection.setblocking(False)
        self.peer = Peer(connection)
        self.connection: socket.socket | None = connection
        self.deadline = time.monotonic() + _PATIENCE
        self._connection = connection
        self._inbox = Inbox(connection)
        self._talk = talk(self)

    def say(self, *fields: bytes) -> None:
        """Send a message.

        Raises:
            OSError: the client has ended, or does not read.
        """
        send(self._connection, fields)

    def trust(self) -> None:
        """Accept long messages and file descriptors from now on."""
        self._inbox.trust()

    def begin(self) -> None:
        """Begin the conversation. Raises as `receive`."""
        next(self._talk)

    def receive(self) -> bool:
        """Receive the available data and go on; return whether the conversation has ended.

        Raises:
            StandbyError: the messages are invalid, or refused.
            OSError: the client has ended, or cannot be answered.
        """
        try:
            message = self._inbox.receive()
        except BlockingIOError:
            return False
        if message is not None:
            try:
                self._talk.send(message)
            except StopIteration:
                return True
        return False

    def keep(self) -> socket.socket:
        """Return the connection; the caller closes it."""
        self.connection = None
        return self._connection

    def refuse(self, reason: StandbyError) -> None:
        """Send the reason of a refusal, if the client reads it."""
        with suppress(OSError):
            self.say(b"no", str(reason).encode())

    def end(self) -> None:
        """Close everything but a connection that was handed over."""
        self._talk.close()
        self._inbox.close()
        self.peer.close()
        if self.connection is not None:
            self.connection.close()

    def release(self) -> None:
        """Close the same in a child that the conversation has forked, in which it goes on."""
        self._inbox.close()
        self.peer.close()
        self._connection.close()


def welcome(visit: Visit, mine: Mapping[str, object]) -> Talk:
    """Identify a client, and this process to it (`proof`).

    Args:
        visit: the client.
        mine: this process's rights.

    Raises:
        StandbyError: it is not the process that connected, or its rights differ.
    """
    visit.say(b"hello", visit.peer.challenge)
    challenge = (yield).argument(b"hello")
    visit.peer.check((yield), b"proof")
    visit.peer.require_same(mine, rights)
    visit.say(b"welcome", challenge)
    visit.trust()
