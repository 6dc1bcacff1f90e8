"""Messages of agents built with ``OVR_LAB``: commands and files.

One job in a session: `Run`, `Stdin`… (empty: end of file; the next one after `Taken`) → `Output`…
`Exited`; `Spawn` → `Spawned`; `Put`, `Data`… (empty: end of file) → `Stored`; `Get` → `Data`…
`End`.

The host returns `Credit` for the bytes of `Output` and `Data` that it has read; the agent pauses
while `WINDOW` bytes are under way. That is less than fills the Unix socket of a vhost-device-vsock,
which (0.3) may lose its wake-up and stall the connection when the socket is full.
"""

from ovr.guest.message import Message

__all__ = [
    "FRAME_COST",
    "PIECE",
    "WINDOW",
    "Credit",
    "Data",
    "End",
    "Exited",
    "Get",
    "Output",
    "Put",
    "Run",
    "Spawn",
    "Spawned",
    "Stdin",
    "Stored",
    "Taken",
]

PIECE = 32 << 10
"""Most bytes of bulk data in one frame from the agent."""
WINDOW = 96 << 10
FRAME_COST = 1024
"""Bytes added for each frame in `WINDOW` and in `Credit`."""


# Host to agent -----------------------------------------------------------------------------


class Run(Message):
    """Run a command; `env` is a list of ``NAME=value`` that replaces the default environment."""

    argv: tuple[str, ...]
    env: tuple[str, ...] | None
    timeout_ms: int


class Stdin(Message):
    """Bytes for the running command's standard input; none: end of file."""

    data: bytes


class Credit(Message):
    """Number of bytes of `Output` or `Data` that were read, plus `FRAME_COST` for each frame."""

    size: int


class Spawn(Message):
    """Start a detached process: own session, no standard input, output to a file or nowhere."""

    argv: tuple[str, ...]
    env: tuple[str, ...] | None
    output: str | None


class Put(Message):
    """Replace the file `path` by the `Data` that follow."""

    path: str
    mode: int


class Get(Message):
    """Send the file `path`."""

    path: str


# Both ways -----------------------------------------------------------------------------------


class Data(Message):
    """A piece of a file; empty from the host: end of file."""

    data: bytes


# Agent to host ---------------------------------------------------------------------------------


class Output(Message):
    """A piece of the running command's output (`stream` 1) or error output (2)."""

    stream: int
    data: bytes


class Taken(Message):
    """The command has read the last `Stdin`, or reads no more."""


class Exited(Message):
    """The command has ended: its exit status, or 128 plus the signal that killed it."""

    status: int
    timed_out: bool


class Spawned(Message):
    """The detached process runs."""

    pid: int


class Stored(Message):
    """All of a `Put` is in its file."""

    size: int


class End(Message):
    """All of a `Get` has been sent."""

    size: int
