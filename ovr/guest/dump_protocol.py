"""Messages of a dump.

`Files`… `Dump` → `Saved`… `Stopped`, or `Failed` or `Aborted`; then any number of `Touch` →
`Touched`, one at a time; then `Go` → `Dumped` | `Failed`, or `Abort` → `Aborted`. `Aborted` may
come unrequested. The silence deadline is as for a restore.

The files sent are the parent image set that CRIU is given (`ovr.dump.parent`).
"""

from ovr.guest.message import Message

__all__ = ["Dump", "Dumped", "Saved"]


class Dump(Message):
    """Have CRIU dump a running tree, up to its post-dump hook.

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
