"""Send the requests of a move's commit to the agent in the guest."""

from collections.abc import Callable
from typing import Final

from ovr.guest import dump_protocol, move_protocol
from ovr.guest.client.dumps import Dumps
from ovr.guest.client.results import Outcome
from ovr.guest.client.steps import STEP_SECONDS

__all__ = ["Moves"]

_DIGITS: Final = frozenset("0123456789abcdef")


class Moves(Dumps):
    """A session for the commit of a move.

    In the source `prepare`, or `adopt` in a later session; then `end_dump` or `abort`. For a
    container of podman's the dump is to leave it running, and `archive` comes before `end_dump`. In
    the destination `begin` with the move's id; then, in any session, `moved`.
    """

    _archive_is_due = False

    def prepare(self, move: str) -> None:
        """Freeze the tree of a held dump until `end_dump` or `abort`, whatever else happens.

        If this session ends before, the move is in doubt. The same if it fails with
        `AgentUnreachable`, unless the agent had not read the request yet.

        Args:
            move: the move's id: `move_protocol.MOVE_ID` lower-case hexadecimal digits.

        Raises:
            AttemptFailed: the guest cannot freeze it, and holds it as before.
            AgentUnreachable: the link broke, or an invalid message came.
        """
        self._send(move_protocol.Prepare(move))
        self._outcome(move_protocol.Prepared, self._deadline(STEP_SECONDS))

    def archive(self, save: Callable[[bytes], None]) -> bytes:
        """Have podman write the archive of a prepared container, which stays frozen.

        If this session ends before, the move is in doubt; `abort` or `end_dump` by a later one
        decide it.

        Args:
            save: called with the pieces of the archive.

        Returns:
            CRIU's ``stats-dump``; empty if podman has put it into the archive.

        Raises:
            CriuFailed: podman or CRIU failed, and the container runs on.
            TreeDamaged: the same, but it may not run as before.
            AttemptFailed: the dump had been aborted before; with the code ``silent``: the host was
                silent, and the move is in doubt; with ``protocol``: no prepared dump by podman that
                is to leave the container running, or its archive was made before.
            AgentUnreachable: the link broke, or an invalid message came.
            BaseException: whatever `save` raises.
        """
        self._archive_is_due = True
        self._send(move_protocol.Archive())
        message = self._receive_archive(save)
        self._archive_is_due = False
        return self._checked(message, dump_protocol.Dumped).stats

    def doubts(self) -> tuple[str, ...]:
        """Return the ids of the moves in doubt: prepared in this guest, without a session.

        Raises:
            AttemptFailed: the guest has too many cgroups to find them.
            AgentUnreachable: the link broke, or an invalid message came.
        """
        self._send(move_protocol.Doubts())
        found = self._outcome(move_protocol.InDoubt, self._deadline(STEP_SECONDS))
        if bad := [move for move in found.moves if not _is_id(move)]:
            raise self._broken(f"{bad[0][:80]!r} for a move in doubt")
        return found.moves

    def adopt(self, move: str, *, engine: str | None = None) -> None:
        """Take over a move in doubt: `end_dump` or `abort` decides it.

        A container whose archive is still being written cannot be adopted yet (code ``busy``).

        If CRIU is gone, or the agent was started again meanwhile, `end_dump` returns no
        statistics, and `abort` fails with an `AttemptFailed` for a tree that runs on but may lack
        what CRIU has not put back, such as its network.

        Args:
            move: its id.
            engine: the engine that dumped it, as for `start_dump`.

        Raises:
            AttemptFailed: the move is not in doubt, or the agent is busy with another session.
            AgentUnreachable: the link broke, or an invalid message came.
        """
        self._engine, self._dumps = engine or "criu", True
        self._send(move_protocol.Adopt(move))
        self._outcome(move_protocol.Prepared, self._deadline(STEP_SECONDS))

    def moved(self, move: str) -> Outcome:
        """Return whether this guest has let the tree of a move run.

        Args:
            move: its id. The agent keeps the outcomes of the newest `move_protocol.MOVES_KEPT`
                moves, and none from before its guest's boot.

        Raises:
            AgentUnreachable: the link broke, or an invalid message came.
        """
        self._send(move_protocol.Moved(move))
        found = self._outcome(move_protocol.Outcome, self._deadline(None))
        return Outcome(found.released, found.held)


def _is_id(move: str) -> bool:
    return len(move) == move_protocol.MOVE_ID and _DIGITS.issuperset(move)
