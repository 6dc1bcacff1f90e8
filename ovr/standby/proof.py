"""Which process is at the other end of a connection, and whether it has this one's rights.

The kernel returns the pid of the process that called connect(2) or listen(2) (SO_PEERCRED); another
process may have that pid by now. So a pidfd of the pid is opened first, and then random bytes are
sent, a challenge. They must come back in a message whose sender has the same pid (SCM_CREDENTIALS).
If the pidfd's process is still alive after that, it has had the pid all the time: it sent the
proof, and everything read from its /proc directory is about it.

That also covers reused pids, inherited connections, and messages sent in advance. It is as strong
as SO_PEERPIDFD of Linux 6.5, and identifies the sender, too. Only a process with CAP_SYS_ADMIN over
the pid namespace can pass a pid that is not its own.

Imports little: each restore waits for it.
"""

import os
import select
import socket
from collections.abc import Callable, Mapping
from typing import Final

from ovr.host.credentials import peer_of
from ovr.standby.messages import Inbox, Message, StandbyError, send
from ovr.standby.peer import difference, rights

__all__ = ["Peer", "meet"]

_CHALLENGE: Final = 16  # random bytes


class Peer:
    """The process at the other end. The caller closes it.

    Args:
        connection: to it.

    Attributes:
        pid: its pid, for as long as it lives (`require_alive`).
        challenge: the bytes that it must send back.

    Raises:
        StandbyError: it is another user's, or cannot be seen from this pid namespace.
        OSError: it has ended.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.pid, uid = peer_of(connection)
        if uid != os.geteuid():
            raise StandbyError("it is another user's")
        if self.pid <= 0:
            raise StandbyError("its pid namespace is not this process's")
        self._pidfd = os.pidfd_open(self.pid)
        self.challenge = os.urandom(_CHALLENGE).hex().encode()

    def check(self, message: Message, word: bytes) -> None:
        """Check the message `word`, which returns the challenge.

        Raises:
            StandbyError: the process has ended, is not the sender, or the answer is wrong.
        """
        if message.argument(word) != self.challenge:
            raise StandbyError("wrong answer to the challenge")
        if message.sender != (self.pid, os.geteuid()):
            raise StandbyError("a message comes from another process")
        self.require_alive()

    def require_same(
        self, mine: Mapping[str, object], of: Callable[[int], Mapping[str, object]]
    ) -> None:
        """Compare the traits (`of`) of its pid with those of this process.

        Raises:
            StandbyError: a trait differs, or cannot be read.
        """
        try:
            theirs = of(self.pid)
        except OSError as error:
            raise StandbyError(f"/proc/{self.pid} cannot be read: {error.strerror}") from error
        self.require_alive()
        if differs := difference(mine, theirs):
            raise StandbyError(f"its {differs} is not this process's")

    def require_alive(self) -> None:
        """Make sure that everything read for its pid was about this process.

        Raises:
            StandbyError: it has ended.
        """
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(0):
            raise StandbyError("it has ended")

    def close(self) -> None:
        """Close the pidfd."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)


def meet(server: socket.socket) -> Inbox:
    """Identify the standby process, and this process to it; only random bytes are sent.

    Args:
        server: a connection to it, with a timeout.

    Returns:
        Its messages from here on.

    Raises:
        StandbyError: its rights differ, it is not the listening process, or it refuses.
        OSError: it has ended, or does not answer.
    """
    peer = Peer(server)
    try:
        inbox = Inbox(server)
        send(server, [b"hello", peer.challenge])
        send(server, [b"proof", inbox.wait().argument(b"hello")])
        peer.check(inbox.wait(), b"welcome")
        peer.require_same(rights(os.getpid()), rights)
    finally:
        peer.close()
    return inbox
