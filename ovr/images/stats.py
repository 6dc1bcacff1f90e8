"""``stats-restore`` and ``stats-dump``, which CRIU leaves in its work directory for other tools.

Schema: images/stats.proto. The file is a service image: two magic numbers, one entry.
"""

from typing import Final

from ovr.images.framing import decode, encode, frames, image_bytes
from ovr.images.wire import UINT32, UINT64, Message, entry, optional, required

__all__ = [
    "STATS_DUMP",
    "STATS_RESTORE",
    "DumpStatsEntry",
    "RestoreStatsEntry",
    "StatsEntry",
    "frozen_seconds",
    "stats_image",
]

STATS_DUMP: Final = "stats-dump"

STATS_RESTORE: Final = "stats-restore"
"""The file's name."""

_UINT32_MAX: Final = (1 << 32) - 1


@entry
class RestoreStatsEntry(Message):
    """``restore_stats_entry``: times are microseconds."""

    pages_compared: int = required(1, UINT64)
    pages_skipped_cow: int = required(2, UINT64)
    forking_time: int = required(3, UINT32)
    restore_time: int = required(4, UINT32)
    pages_restored: int = optional(5, UINT64)


@entry
class DumpStatsEntry(Message):
    """``dump_stats_entry``: times are microseconds."""

    freezing_time: int = required(1, UINT32)
    frozen_time: int = required(2, UINT32)
    memdump_time: int = required(3, UINT32)
    memwrite_time: int = required(4, UINT32)
    pages_scanned: int = required(5, UINT64)
    pages_skipped_parent: int = required(6, UINT64)
    pages_written: int = required(7, UINT64)
    irmap_resolve: int = optional(8, UINT32)
    pages_lazy: int = required(9, UINT64)
    page_pipes: int = optional(10, UINT64)
    page_pipe_bufs: int = optional(11, UINT64)
    shpages_scanned: int = optional(12, UINT64)
    shpages_skipped_parent: int = optional(13, UINT64)
    shpages_written: int = optional(14, UINT64)


@entry
class StatsEntry(Message):
    """``stats_entry``."""

    dump: DumpStatsEntry = optional(1, DumpStatsEntry)
    restore: RestoreStatsEntry = optional(2, RestoreStatsEntry)


def stats_image(*, pages: int, forking: float, total: float) -> bytes:
    """Return the content of a ``stats-restore``.

    Pages compared and skipped are zero: ovr compares no pages with a parent's.

    Args:
        pages: number of pages restored, outside and inside.
        forking: seconds until the skeleton was complete.
        total: seconds of the whole restore.
    """
    stats = StatsEntry(
        restore=RestoreStatsEntry(
            pages_compared=0,
            pages_skipped_cow=0,
            forking_time=_microseconds(forking),
            restore_time=_microseconds(total),
            pages_restored=pages,
        )
    )
    return image_bytes(STATS_RESTORE, [encode(stats)])


def frozen_seconds(data: bytes) -> float:
    """Return the seconds that CRIU's ``stats-dump`` says the tree did not run; 0 if it says none.

    Raises:
        ImagesDamaged, ImagesUnsupported: it is invalid.
    """
    if not data:
        return 0.0
    (frame,) = frames(data, STATS_DUMP)
    return decode(StatsEntry, frame.payload, STATS_DUMP).dump.frozen_time / 1e6


def _microseconds(seconds: float) -> int:
    return min(round(seconds * 1e6), _UINT32_MAX)
