"""The result of a dump."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ovr.attempt.attempt import Attempt
from ovr.attempt.stopwatch import Span, Stopwatch, rounded, timeline
from ovr.dump.container import Running
from ovr.dump.memory import Placed
from ovr.dump.precopy import Round
from ovr.errors import ImagesDamaged, ImagesUnsupported
from ovr.images.stats import DumpStatsEntry, dump_stats
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.extents import total

__all__ = ["DumpReport", "make_report"]

log = logging.getLogger("ovr.dump")


@dataclass
class DumpReport:
    """One dump. Bytes are page bytes of all tasks and of shared memory; times are seconds.

    Attributes:
        pid: the root task's pid, in the guest's initial pid namespace.
        container: the engine's id of the container; None: it was no container.
        tasks: number of tasks with memory.
        left_running: whether the tree runs on.
        bytes_total: size of all pages in the images.
        bytes_outside: bytes that were read from the VM's RAM.
        bytes_pre_copied: of those, what was read while the tree ran, and had not changed since.
        bytes_inside: bytes that CRIU has written and the agent has sent.
        bytes_written_twice: of `bytes_outside`, what CRIU has written as well: what was written to
            since it was tracked, shared memory, and pages that it always writes.
        frozen: seconds that the tree did not run, as CRIU and the agent measured them.
        rounds: the rounds of pre-copies; the last one is the look before CRIU stops the tree.
        verified: ``none``, ``sample`` or ``full``.
        held: as for a restore.
        spans: when each phase was.
        holds: when the VM was held.
        stats: content of ``stats-dump``: CRIU's, with the pages that were read outside.
        unread_config: CRIU's configuration files in the guest that were not read, by path.
    """

    pid: int = 0
    container: str | None = None
    tasks: int = 0
    left_running: bool = False
    bytes_total: int = 0
    bytes_outside: int = 0
    bytes_pre_copied: int = 0
    bytes_inside: int = 0
    bytes_written_twice: int = 0
    frozen: float = 0.0
    rounds: Sequence[Round] = ()
    verified: str = "none"
    bytes_verified: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    held: dict[str, Any] = field(default_factory=dict)
    spans: Sequence[Span] = ()
    holds: Sequence[Span] = ()
    stats: DumpStatsEntry = field(default_factory=DumpStatsEntry)
    unread_config: Mapping[str, str] = field(default_factory=dict)

    @property
    def copy_gb_per_s(self) -> float:
        """Bytes read outside by the seconds of the memory phase, in 10^9 bytes."""
        spent = self.seconds.get("memory", 0.0)
        return self.bytes_outside / spent / 1e9 if spent else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the fields of ``ovr.dump/1``."""
        return {
            "pid": self.pid,
            "container": self.container,
            "tasks": self.tasks,
            "left_running": self.left_running,
            "bytes_total": self.bytes_total,
            "bytes_outside": self.bytes_outside,
            "bytes_pre_copied": self.bytes_pre_copied,
            "bytes_inside": self.bytes_inside,
            "bytes_written_twice": self.bytes_written_twice,
            "frozen": round(self.frozen, 6),
            "rounds": [rounded(one._asdict()) for one in self.rounds],
            "verify": self.verified,
            "bytes_verified": self.bytes_verified,
            "seconds": rounded(self.seconds),
            "held": rounded(self.held),
            "copy_gb_per_s": round(self.copy_gb_per_s, 3),
            "timeline": timeline(self.spans),
        }


def make_report(
    running: Running,
    placed: Sequence[Placed],
    fetched: Sequence[Placed],
    attempt: Attempt,
    stats: bytes,
    *,
    watch: Stopwatch,
    left_running: bool,
    verified: tuple[str, int],
    unread_config: Mapping[str, str],
    rounds: Sequence[Round],
) -> DumpReport:
    """Return the report of a dump that was committed.

    Args:
        running: the tree.
        placed: the pages that were read outside.
        fetched: those that CRIU has written.
        attempt: committed.
        stats: CRIU's ``stats-dump``, empty if it has left none.
        watch: the times.
        left_running: whether the tree runs on.
        verified: how memory was verified, and how many bytes of it.
        unread_config: CRIU's configuration files in the guest.
        rounds: of pre-copies.
    """
    watch.seconds["total"] = watch.total()
    outside = sum(total(one.dumped.pagemap.entries) for one in placed)
    inside = sum(total(one.dumped.pagemap.entries) for one in fetched)
    pre_copied = outside - sum(total(one.pieces) for one in placed)
    private = sum(total(one.dumped.pagemap.entries) for one in placed if not one.dumped.shared)
    result = _stats(stats, private, pre_copied, watch.seconds.get("memory", 0.0))
    return DumpReport(
        pid=running.pid,
        container=running.id,
        tasks=sum(not one.dumped.shared for one in placed),
        left_running=left_running,
        bytes_total=outside + inside,
        bytes_outside=outside,
        bytes_pre_copied=pre_copied,
        bytes_inside=inside,
        bytes_written_twice=outside - sum(total(one.dumped.clean) for one in placed),
        frozen=result.frozen_time / 1e6 + sum(one.frozen for one in rounds),
        rounds=rounds,
        verified=verified[0],
        bytes_verified=verified[1],
        seconds=watch.seconds,
        held=attempt.holder.as_json(),
        spans=tuple(watch.spans),
        holds=tuple(watch.span("held", *times) for times in attempt.holder.spans),
        stats=result,
        unread_config=unread_config,
    )


def _stats(data: bytes, private: int, pre_copied: int, memory: float) -> DumpStatsEntry:
    # The dump is done: bad statistics are no failure.
    written, skipped = (private - pre_copied) // PAGE_SIZE, pre_copied // PAGE_SIZE
    try:
        return dump_stats(data, written=written, skipped=skipped, memory=memory)
    except (ImagesDamaged, ImagesUnsupported) as error:
        log.warning("the statistics of the guest's CRIU are invalid: %s", error)
        return dump_stats(b"", written=written, skipped=skipped, memory=memory)
