"""A client of the process that stands by, until it has its answer or a child works for it."""

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
"""A conversation: it is resumed with each message that comes."""

_PATIENCE: Final = 5.0  # seconds, for all of it; nobody else waits meanwhile


class Visit:
    """A connection on which nothing is waited for.

    Args:
        connection: just accepted; the visit closes it.
        talk: what to say.

    Attributes:
        peer: who is at the other end.
        connection: to it; None once a child works for it.
        deadline: of time.monotonic, by which all must be said.

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
            OSError: the client has gone, or does not read.
        """
        send(self._connection, fields)

    def trust(self) -> None:
        """Take long messages and file descriptors from now on."""
        self._inbox.trust()

    def begin(self) -> None:
        """Begin to talk. Raises as `hear`."""
        next(self._talk)

    def hear(self) -> bool:
        """Receive what has come and go on; return whether all has been said.

        Raises:
            StandbyError: what was said makes no sense, or is refused.
            OSError: the client has gone, or cannot be answered.
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
        """Return the connection, which is the caller's from now on."""
        self.connection = None
        return self._connection

    def refuse(self, reason: StandbyError) -> None:
        """Say why not, if the client reads it."""
        with suppress(OSError):
            self.say(b"no", str(reason).encode())

    def end(self) -> None:
        """Close all that this visit has open, but a connection that was kept."""
        self._talk.close()
        self._inbox.close()
        self.peer.close()
        if self.connection is not None:
            self.connection.close()

    def release(self) -> None:
        """Close the same in a child that the talk has forked, which goes on in there."""
        self._inbox.close()
        self.peer.close()
        self._connection.close()


def welcome(visit: Visit, mine: Mapping[str, object]) -> Talk:
    """Make sure of a client, and let it make sure of this process (`proof`).

    Args:
        visit: the client.
        mine: this process's rights.

    Raises:
        StandbyError: it is not who connected, or its rights are others.
    """
    visit.say(b"hello", visit.peer.challenge)
    challenge = (yield).argument(b"hello")
    visit.peer.check((yield), b"proof")
    visit.peer.require_same(mine, rights)
    visit.say(b"welcome", challenge)
    visit.trust()
