"""The result of a move."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ovr.attempt.attempt import Attempt
from ovr.attempt.stopwatch import Span, Stopwatch, rounded, timeline
from ovr.dump.precopy import Round
from ovr.move.arrival import Arrived
from ovr.plan import Cold, Warm

__all__ = ["MoveReport", "make_report"]


@dataclass
class MoveReport:
    """One move. Bytes are page bytes of all tasks and of shared memory; times are seconds.

    Attributes:
        move: its id.
        pid: the root task's pid in the destination's initial pid namespace.
        container: podman's id of the container; None: it is none.
        tasks: number of tasks with memory.
        bytes_total: size of all pages.
        bytes_outside: size of those that went from RAM to RAM.
        bytes_inside: size of those in CRIU's images.
        bytes_ahead: size of pages outside that were copied while the tree ran, and are unchanged.
        bytes_copied: bytes copied from RAM to RAM; pages that changed meanwhile count each time.
        rounds: the rounds of copies while the tree ran; the last one is the look before CRIU stops
            the tree.
        downtime: from the last look at the running tree to its first instruction in the
            destination, as measured by ``ovr``; neither is later or earlier than that.
        verified: ``none``, ``sample`` or ``full``.
        skeleton: ``warm`` if memory came from a pool in the destination, else ``cold``.
        skeleton_why: why it is cold.
        held: for each side, as for a restore.
        spans: when each phase was.
    """

    move: str = ""
    pid: int = 0
    container: str | None = None
    tasks: int = 0
    bytes_total: int = 0
    bytes_outside: int = 0
    bytes_inside: int = 0
    bytes_ahead: int = 0
    bytes_copied: int = 0
    rounds: Sequence[Round] = ()
    downtime: float = 0.0
    verified: str = "none"
    bytes_verified: int = 0
    skeleton: str = "cold"
    skeleton_why: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    held: dict[str, dict[str, Any]] = field(default_factory=dict)
    spans: Sequence[Span] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the fields of ``ovr.move/1``."""
        return {
            "move": self.move,
            "pid": self.pid,
            "container": self.container,
            "tasks": self.tasks,
            "bytes_total": self.bytes_total,
            "bytes_outside": self.bytes_outside,
            "bytes_inside": self.bytes_inside,
            "bytes_ahead": self.bytes_ahead,
            "bytes_copied": self.bytes_copied,
            "rounds": [rounded(one._asdict()) for one in self.rounds],
            "downtime": round(self.downtime, 6),
            "verify": self.verified,
            "bytes_verified": self.bytes_verified,
            "skeleton": self.skeleton,
            "skeleton_why": self.skeleton_why,
            "seconds": rounded(self.seconds),
            "held": {side: rounded(held) for side, held in self.held.items()},
            "timeline": timeline(self.spans),
        }


def make_report(
    move: str,
    arrived: Arrived,
    *,
    container: str | None,
    source: Attempt,
    destination: Attempt,
    rounds: Sequence[Round],
    downtime: float,
    watch: Stopwatch,
    verified: str,
) -> MoveReport:
    """Return the report of a move that was committed.

    Args:
        move: its id.
        arrived: the tree.
        container: as in the report.
        source: committed.
        destination: committed.
        rounds: of copies while the tree ran.
        downtime: as in the report.
        watch: the times.
        verified: how memory was verified.
    """
    watch.seconds["total"] = watch.total()
    plan, memory = arrived.plan, arrived.built.memory
    return MoveReport(
        move=move,
        pid=arrived.root_pid,
        container=container,
        tasks=len(plan.tasks),
        bytes_total=plan.bytes_total,
        bytes_outside=plan.bytes_outside,
        bytes_inside=plan.bytes_total - plan.bytes_outside,
        bytes_ahead=plan.bytes_outside - arrived.copied,
        bytes_copied=arrived.copied + sum(one.size for one in rounds),
        rounds=rounds,
        downtime=downtime,
        verified=verified,
        bytes_verified=arrived.compared,
        skeleton="warm" if isinstance(memory, Warm) else "cold",
        skeleton_why=memory.why if isinstance(memory, Cold) else "",
        seconds=watch.seconds,
        held={"source": source.holder.as_json(), "destination": destination.holder.as_json()},
        spans=tuple(watch.spans),
    )
