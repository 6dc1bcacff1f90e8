"""Messages of a dump.

`Track` → `Tracked`, at any time before the dump; `Files`… `Dump` → `Saved`… `Stopped`, or `Failed`
or `Aborted`; then any number of `Touch` → `Touched`, `Map` → `Mapped` and `Fetch` → `Saved`…
`Stopped`, one at a time; then `Go` → `Dumped` | `Failed`, or `Abort` → `Aborted`. `Aborted` may
come unrequested. The silence deadline is as for a restore.

The files sent are the parent image set that CRIU is given (`ovr.dump.parent`). All images that CRIU
has written are sent before the first `Stopped`, but for pages images.
"""

from ovr.guest.message import Message

__all__ = ["PAGES", "Dump", "Dumped", "Fetch", "Saved", "Track", "Tracked"]

PAGES = "pages-"
"""Prefix of the names of pages images."""


class Track(Message):
    """Clear the soft-dirty bits of a running tree: what it writes to from now on is marked.

    Attributes:
        pid: pid of the root task, in the agent's pid namespace.
    """

    pid: int


class Fetch(Message):
    """Request the pages image `name`."""

    name: str


class Dump(Message):
    """Have CRIU dump a running tree, up to its post-dump hook.

    Attributes:
        pid: pid of the root task, in the agent's pid namespace.
        criu_options: appended to the command line of CRIU.
        leave_running: let the tree run on after `Go`, instead of ending it.
        tracked: the soft-dirty bits were cleared by `Track`. Otherwise they are cleared when CRIU
            starts, so that it finds few pages that were written to.
        silence_ms, stall_ms, timeout_ms, log_level, keep_log: as for `Begin`. What the agent aborts
            before CRIU has reached its hook ends when CRIU reaches it.
    """

    pid: int
    criu_options: tuple[str, ...]
    leave_running: bool
    tracked: bool
    silence_ms: int
    stall_ms: int
    log_level: int
    keep_log: bool
    timeout_ms: int | None = None


class Tracked(Message):
    """The answer to `Track`."""


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
