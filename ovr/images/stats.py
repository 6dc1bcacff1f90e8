"""Make ``stats-restore``, which CRIU leaves in its work directory for other tools.

Schema: images/stats.proto. The file is a service image: two magic numbers, one entry.
"""

from typing import Final

from ovr.images.framing import encode, image_bytes
from ovr.images.wire import UINT32, UINT64, Message, entry, optional, required

__all__ = ["STATS_RESTORE", "RestoreStatsEntry", "StatsEntry", "stats_image"]

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
class StatsEntry(Message):
    """``stats_entry``, without the part of a dump."""

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


def _microseconds(seconds: float) -> int:
    return min(round(seconds * 1e6), _UINT32_MAX)
