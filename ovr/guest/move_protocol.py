"""Messages of a move: the commit, in which at most one of two trees may ever run.

A move dumps a tree in its source and restores it in its destination; both sides know it by an id,
`MOVE_ID` lower-case hexadecimal digits.

Source
    In a dump that is held, `Prepare` → `Prepared`. From then on nothing but `Go` or `Abort` of the
    host ends the tree or lets it run: no silence, no broken link, no end of CRIU or of the agent.
    A prepared move without a session is *in doubt*: `Doubts` → `InDoubt` names it, and `Adopt` →
    `Prepared` hands it to another session. Then `Go` → `Dumped`, or `Abort` → `Aborted`, as in
    `dump_protocol`.

Source, of a container of podman's
    The destination needs podman's archive before the commit, and podman writes it only when its
    CRIU has ended. So the dump is one that leaves the tree running, and between `Prepared` and `Go`
    comes `Archive` → `Saved`… (named `protocol.ENGINE_ARCHIVE`) `Dumped`: CRIU has let the tree go,
    and the cgroups hold it. `Failed` or `Aborted` instead: it runs on. Until the answer the host
    must not be silent; if it is, or the link breaks, podman is left to end, its archive is lost,
    and the move is in doubt; it cannot be adopted before podman has ended. `Abort` is possible at
    any time before `Go`.

    `Go` has podman remove the container → `Dumped`. If podman fails, or does not end within a
    minute, the answer is an `Error`; the move is still prepared, and `Go` can be repeated, but no
    `Abort` is accepted any more.

Destination
    `Begin` has the id. `Moved` → `Outcome`, at any time, in any session.

Without authentication none of these is answered.
"""

from ovr.guest.message import Message

__all__ = [
    "MOVES_KEPT",
    "MOVE_ID",
    "Adopt",
    "Archive",
    "Doubts",
    "InDoubt",
    "Moved",
    "Outcome",
    "Prepare",
    "Prepared",
]

MOVE_ID = 32
"""Hexadecimal digits in the id of a move."""
MOVES_KEPT = 64
"""Number of moves to a guest, the newest ones, whose outcome its agent keeps."""


class Prepare(Message):
    """Freeze a held dump's tree until `Go` or `Abort`, whatever else happens.

    Not for a tree that is to run on, unless podman dumps it; then all of it must be in cgroups of
    its container. After an `Error` it is held as before.
    """

    move: str


class Archive(Message):
    """Have CRIU let go of a prepared tree, which stays frozen, and podman write its archive."""


class Doubts(Message):
    """Request an `InDoubt`."""


class Adopt(Message):
    """Take over a move in doubt."""

    move: str


class Moved(Message):
    """Request the `Outcome` of a move to this guest."""

    move: str


class Prepared(Message):
    """The tree is frozen, and this session's to decide on."""


class InDoubt(Message):
    """The moves from this guest that are prepared and have no session."""

    moves: tuple[str, ...]


class Outcome(Message):
    """The answer to `Moved`.

    Attributes:
        released: since its boot, this guest has let the move's tree run.
        held: a restore of the move is under way; nothing is decided yet.
    """

    released: bool
    held: bool
