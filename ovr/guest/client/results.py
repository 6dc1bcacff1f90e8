"""What the agent reports of its work."""

from dataclasses import dataclass

from ovr.memory.addresses import Gva

__all__ = ["HeldTree", "MappedObject", "Outcome", "PoolInfo", "Restored"]


@dataclass(frozen=True)
class HeldTree:
    """The stopped tree that CRIU holds; pids in the guest's initial pid namespace.

    Attributes:
        root_pid: pid of the root task.
        criu_pid: pid of CRIU, which traces all tasks and is itself stopped.
        tasks: the ids of all held threads, leaders included.
        warm: bytes of areas that use memory from the pool.
        note: the reason why none or not all do.
    """

    root_pid: int
    criu_pid: int
    tasks: tuple[int, ...]
    warm: int = 0
    note: str = ""


@dataclass(frozen=True)
class Restored:
    """The running tree: the pid of its root, and the engine's id of the container."""

    pid: int
    container: str | None = None


@dataclass(frozen=True)
class MappedObject:
    """A shared object mapped by a process of the agent; `pid` as for `HeldTree`."""

    pid: int
    address: Gva


@dataclass(frozen=True)
class Outcome:
    """The outcome of a move, in its destination.

    Attributes:
        released: since its boot, the guest has let the moved tree run.
        held: a restore of the move is under way; nothing is decided yet.
    """

    released: bool
    held: bool


@dataclass(frozen=True)
class PoolInfo:
    """The present pool.

    Attributes:
        size: its size in bytes; 0 if there is none.
        huge: bytes of it in huge pages.
        pid: the process that has it, as for `HeldTree`.
        address: its GVA in that process.
        note: the reason why there is none.
    """

    size: int
    huge: int
    pid: int
    address: Gva
    note: str
