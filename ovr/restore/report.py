"""The result of a restore."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ovr.attempt.attempt import Attempt
from ovr.attempt.journal import Journal
from ovr.attempt.stopwatch import Span, Stopwatch, rounded, timeline
from ovr.guest.client.results import Restored
from ovr.plan import Cold, Plan, Warm
from ovr.restore.skeleton import Built

__all__ = ["Report", "make_report"]


@dataclass
class Report:
    """One restore. Bytes are page bytes of all tasks and of shared memory; times are seconds.

    Attributes:
        pid: the root task's pid, as the guest's agent sees it.
        container: what its engine calls it; None where no engine has a part in it.
        tasks: how many tasks have been restored, threads not counted.
        bytes_cow: of those inside, what parents and children go on sharing copy-on-write.
        states: the kinds of state written from outside.
        verified: ``none``, ``sample`` or ``full``.
        held: what the VM was held for: ``count``, ``seconds`` in all, ``longest``; and ``by``
            which way: ``ptrace`` or ``sigstop``.
        reasons: bytes by where they went and why, the names of `placement.Reason` in lower case.
        spans: when each phase was.
        holds: when the VM was held.
        journal: what was written where.
        skeleton: ``warm`` if memory came from a pool in the guest, else ``cold``.
        skeleton_why: why it is cold.
        bytes_warm: how much of the memory came from the pool.
        unread_config: CRIU's configuration files in the guest that were not read, by path.
    """

    pid: int = 0
    container: str | None = None
    tasks: int = 0
    states: tuple[str, ...] = ()
    bytes_total: int = 0
    bytes_outside: int = 0
    bytes_inside: int = 0
    bytes_cow: int = 0
    verified: str = "none"
    bytes_verified: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    held: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    spans: Sequence[Span] = ()
    holds: Sequence[Span] = ()
    journal: Journal = field(default_factory=Journal)
    skeleton: str = "cold"
    skeleton_why: str = ""
    bytes_warm: int = 0
    unread_config: Mapping[str, str] = field(default_factory=dict)

    @property
    def copy_gb_per_s(self) -> float:
        """Bytes written outside by the seconds of the whole memory phase, in 10^9 bytes."""
        spent = self.seconds.get("memory", 0.0)
        return self.bytes_outside / spent / 1e9 if spent else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the fields of ``ovr.restore/1``."""
        return {
            "pid": self.pid,
            "container": self.container,
            "tasks": self.tasks,
            "states": list(self.states),
            "bytes_total": self.bytes_total,
            "bytes_outside": self.bytes_outside,
            "bytes_inside": self.bytes_inside,
            "bytes_cow": self.bytes_cow,
            "verify": self.verified,
            "bytes_verified": self.bytes_verified,
            "seconds": rounded(self.seconds),
            "held": rounded(self.held),
            "copy_gb_per_s": round(self.copy_gb_per_s, 3),
            "bytes_by_reason": self.reasons,
            "timeline": timeline(self.spans),
            "journal": self.journal.as_json(),
            "skeleton": self.skeleton,
            "skeleton_why": self.skeleton_why,
            "bytes_warm": self.bytes_warm,
        }


def make_report(
    plan: Plan,
    attempt: Attempt,
    built: Built,
    root: Restored,
    *,
    watch: Stopwatch,
    verified: tuple[str, int],
) -> Report:
    """Return the report of a restore whose tree runs.

    Args:
        plan: what was planned.
        attempt: committed.
        built: the skeleton.
        root: the tree.
        watch: the times.
        verified: how memory was verified, and how many bytes of it.
    """
    watch.seconds["total"] = watch.total()
    return Report(
        pid=root.pid,
        container=root.container,
        tasks=len(plan.tasks),
        states=plan.states,
        bytes_total=plan.bytes_total,
        bytes_outside=plan.bytes_outside,
        bytes_inside=plan.bytes_total - plan.bytes_outside,
        bytes_cow=plan.bytes_cow,
        verified=verified[0],
        bytes_verified=verified[1],
        seconds=watch.seconds,
        held=attempt.holder.as_json(),
        reasons={reason.name.lower(): count for reason, count in plan.by_reason().items()},
        spans=tuple(watch.spans),
        holds=tuple(watch.span("held", *times) for times in attempt.holder.spans),
        journal=attempt.journal,
        skeleton="warm" if isinstance(built.memory, Warm) else "cold",
        skeleton_why=built.memory.why if isinstance(built.memory, Cold) else "",
        bytes_warm=built.memory.bytes if isinstance(built.memory, Warm) else 0,
        unread_config=built.unread_config,
    )
