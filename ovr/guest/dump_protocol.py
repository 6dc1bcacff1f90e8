"""Messages of a dump.

`Find` → `Found`, at any time before the dump. `Files`… `Dump` → `Starts`, or `Failed` or `Aborted`;
then any number of `Freeze` → `Frozen`, of `Track` → `Tracked`, and of `Files`. After a `Track` with
`stop` come `Saved`… `Stopped`, or `Failed` or `Aborted`; then any number of `Touch` → `Touched`,
`Map` → `Mapped` and `Fetch` → `Saved`… `Stopped`, one at a time; then `Go` → `Dumped` | `Failed`,
or `Abort` → `Aborted`. `Aborted` may come unrequested. The silence deadline is as for a restore.
After `Go`, podman's archive comes before the answer as `Saved`…, with the name
`protocol.ENGINE_ARCHIVE`; until then the host must not be silent either, or the rest of it is lost.

The files sent are the parent image set that CRIU is given (`ovr.dump.parent`). All images that CRIU
has written are sent before the first `Stopped`, but for pages images. For an engine, the name of
the parent's inventory has the prefix `protocol.HOOK_HELD`.
"""

from ovr.guest.message import Message

__all__ = [
    "PAGES",
    "Dump",
    "Dumped",
    "Fetch",
    "Find",
    "Found",
    "Freeze",
    "Frozen",
    "Saved",
    "Starts",
    "Track",
    "Tracked",
]

PAGES = "pages-"
"""Prefix of the names of pages images."""


class Find(Message):
    """Have an engine describe a container.

    Attributes:
        engine: ``podman``, ``runc`` or ``crun``.
        name: name or id of the container.
    """

    engine: str
    name: str


class Freeze(Message):
    """Stop all threads of the tree until `Track`; unless that comes soon, the dump is aborted."""


class Track(Message):
    """Clear the soft-dirty bits of the tree: what it writes to from now on is marked.

    A tree that is frozen runs on then.

    Attributes:
        stop: then let CRIU go on, which stops the tree first.
    """

    stop: bool


class Fetch(Message):
    """Request the pages image `name`."""

    name: str


class Dump(Message):
    """Start CRIU, which dumps a running tree, up to its post-dump hook.

    Attributes:
        pid: pid of the root task, in the agent's pid namespace.
        criu_options: appended to the command line of CRIU or the engine.
        leave_running: let the tree run on after `Go`, instead of ending it.
        silence_ms, stall_ms, timeout_ms, log_level, keep_log: as for `Begin`. What the agent aborts
            before CRIU has reached its hook ends when CRIU reaches it.
        engine: the engine of the container of which `pid` is the root; none: it is dumped by CRIU
            without an engine.
        name: then the container's name or id.
    """

    pid: int
    criu_options: tuple[str, ...]
    leave_running: bool
    silence_ms: int
    stall_ms: int
    log_level: int
    keep_log: bool
    timeout_ms: int | None = None
    engine: str | None = None
    name: str | None = None


class Found(Message):
    """The answer to `Find`.

    Attributes:
        status: the engine's exit status, or 128 plus the signal that killed it.
        data: what it printed: JSON with the container's state.
        text: the last line of its errors.
    """

    status: int
    data: bytes
    text: str


class Starts(Message):
    """CRIU runs its pre-dump hook: it waits before it stops the tree."""


class Frozen(Message):
    """All threads of the tree are stopped."""


class Tracked(Message):
    """The answer to `Track`; `frozen_us`: for how long the tree was frozen, in microseconds."""

    frozen_us: int


class Saved(Message):
    """A piece of the image `name` that CRIU has written; an empty one ends the image."""

    name: str
    data: bytes


class Dumped(Message):
    """CRIU has ended the tree, or let it run on, and has ended itself.

    As the answer to `move_protocol.Archive`: CRIU has let it go, and it is frozen.

    Attributes:
        stats: its ``stats-dump``; empty if podman has put it into the archive.
    """

    stats: bytes
