"""Steps of a restore or dump: requests whose answer may be a failure."""

import time
from typing import Final, TypeVar

from ovr.errors import AgentUnreachable
from ovr.guest import protocol
from ovr.guest.client.failures import aborted, failure, refused
from ovr.guest.client.session import Session
from ovr.guest.message import Message

__all__ = ["STALL_SECONDS", "STEP_SECONDS", "Steps"]

MessageT = TypeVar("MessageT", bound=Message)

STALL_SECONDS: Final = 120.0
STEP_SECONDS: Final = 900.0
"""Seconds for a step whose work is bounded, in a guest that is very busy."""


class Steps(Session):
    """A session in which CRIU works."""

    _engine = "criu"
    _dumps = False

    def _send_or_fail(self, message: Message) -> None:
        """Send during an upload; raise the agent's error if it has closed the session."""
        try:
            self._send(message)
        except AgentUnreachable:
            # The error that the agent sent before it closed may still be unread.
            self._outcome(protocol.Stopped, time.monotonic())
            raise

    def _outcome(self, kind: type[MessageT], deadline: float | None = None) -> MessageT:
        """Return the `kind` message that ends a step; without a deadline, wait while pings work."""
        return self._checked(self._receive(deadline), kind)

    def _checked(self, message: Message, kind: type[MessageT]) -> MessageT:
        if isinstance(message, kind):
            return message
        if isinstance(message, protocol.Failed):
            raise failure(message, self._engine, dump=self._dumps)
        if isinstance(message, protocol.Aborted):
            raise aborted(message, dump=self._dumps)
        if isinstance(message, protocol.Error):
            raise refused(message)
        raise self._broken(f"{message.op} instead of {kind.op}")
