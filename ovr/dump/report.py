"""The result of a dump."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ovr.attempt.attempt import Attempt
from ovr.attempt.stopwatch import Span, Stopwatch
from ovr.dump.memory import TaskPages
from ovr.errors import ImagesDamaged, ImagesUnsupported
from ovr.images.stats import DumpStatsEntry, dump_stats
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.extents import total

__all__ = ["DumpReport", "make_report"]

log = logging.getLogger("ovr.dump")


@dataclass
class DumpReport:
    """One dump. Bytes are page bytes of all tasks, without shared memory; times are seconds.

    Attributes:
        pid: the root task's pid, in the guest's initial pid namespace.
        tasks: number of tasks with memory.
        left_running: whether the tree runs on.
        bytes_outside: bytes that were read from the VM's RAM.
        bytes_inside: bytes that CRIU has written: what was written to after it was asked, and
            pages that it always writes.
        frozen: seconds that the tree did not run, as CRIU measured them.
        verified: ``none``, ``sample`` or ``full``.
        held: as for a restore.
        spans: when each phase was.
        holds: when the VM was held.
        stats: content of ``stats-dump``: CRIU's, with the pages that were read outside.
        unread_config: CRIU's configuration files in the guest that were not read, by path.
    """

    pid: int = 0
    tasks: int = 0
    left_running: bool = False
    bytes_outside: int = 0
    bytes_inside: int = 0
    frozen: float = 0.0
    verified: str = "none"
    bytes_verified: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    held: dict[str, Any] = field(default_factory=dict)
    spans: Sequence[Span] = ()
    holds: Sequence[Span] = ()
    stats: DumpStatsEntry = field(default_factory=DumpStatsEntry)
    unread_config: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes_total(self) -> int:
        """Page bytes of all tasks."""
        return self.bytes_outside + self.bytes_inside

    @property
    def copy_gb_per_s(self) -> float:
        """Bytes read outside by the seconds of the memory phase, in 10^9 bytes."""
        spent = self.seconds.get("memory", 0.0)
        return self.bytes_outside / spent / 1e9 if spent else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the fields of ``ovr.dump/1``."""
        return {
            "pid": self.pid,
            "tasks": self.tasks,
            "left_running": self.left_running,
            "bytes_total": self.bytes_total,
            "bytes_outside": self.bytes_outside,
            "bytes_inside": self.bytes_inside,
            "frozen": round(self.frozen, 6),
            "verify": self.verified,
            "bytes_verified": self.bytes_verified,
            "seconds": {name: round(value, 6) for name, value in self.seconds.items()},
            "held": {
                name: round(value, 6) if isinstance(value, float) else value
                for name, value in self.held.items()
            },
            "copy_gb_per_s": round(self.copy_gb_per_s, 3),
            "timeline": [
                {"phase": span.name, "start": round(span.start, 6), "end": round(span.end, 6)}
                for span in self.spans
            ],
        }


def make_report(
    pid: int,
    tasks: Sequence[TaskPages],
    attempt: Attempt,
    stats: bytes,
    *,
    watch: Stopwatch,
    left_running: bool,
    verified: tuple[str, int],
    unread_config: Mapping[str, str],
) -> DumpReport:
    """Return the report of a dump that was committed.

    Args:
        pid: the root task.
        tasks: their pages.
        attempt: committed.
        stats: CRIU's ``stats-dump``, empty if it has left none.
        watch: the times.
        left_running: whether the tree runs on.
        verified: how memory was verified, and how many bytes of it.
        unread_config: CRIU's configuration files in the guest.
    """
    watch.seconds["total"] = watch.total()
    report = DumpReport(
        pid=pid,
        tasks=len(tasks),
        left_running=left_running,
        bytes_outside=sum(total(one.pieces) for one in tasks),
        bytes_inside=sum(one.inside for one in tasks),
        verified=verified[0],
        bytes_verified=verified[1],
        seconds=watch.seconds,
        held=attempt.holder.as_json(),
        spans=tuple(watch.spans),
        holds=tuple(watch.span("held", *times) for times in attempt.holder.spans),
        unread_config=unread_config,
    )
    report.stats = _stats(stats, report)
    report.frozen = report.stats.frozen_time / 1e6
    return report


def _stats(data: bytes, report: DumpReport) -> DumpStatsEntry:
    # The dump is done: bad statistics are no failure.
    pages, memory = report.bytes_total // PAGE_SIZE, report.seconds.get("memory", 0.0)
    try:
        return dump_stats(data, pages=pages, memory=memory)
    except (ImagesDamaged, ImagesUnsupported) as error:
        log.warning("the statistics of the guest's CRIU are invalid: %s", error)
        return dump_stats(b"", pages=pages, memory=memory)
