"""Messages of a dump.

`Files`… `Dump` → `Starts`, or `Failed` or `Aborted`; then any number of `Freeze` → `Frozen`, of
`Track` → `Tracked`, and of `Files`. After a `Track` with `stop` come `Saved`… `Stopped`, or
`Failed` or `Aborted`; then any number of `Touch` → `Touched`, `Map` → `Mapped` and `Fetch` →
`Saved`… `Stopped`, one at a time; then `Go` → `Dumped` | `Failed`, or `Abort` → `Aborted`.
`Aborted` may come unrequested. The silence deadline is as for a restore.

The files sent are the parent image set that CRIU is given (`ovr.dump.parent`). All images that CRIU
has written are sent before the first `Stopped`, but for pages images.
"""

from ovr.guest.message import Message

__all__ = [
    "PAGES",
    "Dump",
    "Dumped",
    "Fetch",
    "Freeze",
    "Frozen",
    "Saved",
    "Starts",
    "Track",
    "Tracked",
]

PAGES = "pages-"
"""Prefix of the names of pages images."""


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
        criu_options: appended to the command line of CRIU.
        leave_running: let the tree run on after `Go`, instead of ending it.
        silence_ms, stall_ms, timeout_ms, log_level, keep_log: as for `Begin`. What the agent aborts
            before CRIU has reached its hook ends when CRIU reaches it.
    """

    pid: int
    criu_options: tuple[str, ...]
    leave_running: bool
    silence_ms: int
    stall_ms: int
    log_level: int
    keep_log: bool
    timeout_ms: int | None = None


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

    Attributes:
        stats: its ``stats-dump``.
    """

    stats: bytes
