"""``stats-restore`` and ``stats-dump``, which CRIU leaves in its work directory for other tools.

Schema: images/stats.proto. The file is a service image: two magic numbers, one entry.
"""

from typing import Final

from ovr.errors import ImagesDamaged
from ovr.images.framing import decode, encode, frames, image_bytes
from ovr.images.wire import UINT32, UINT64, Message, copy_of, entry, optional, required

__all__ = [
    "STATS_DUMP",
    "STATS_RESTORE",
    "DumpStatsEntry",
    "RestoreStatsEntry",
    "StatsEntry",
    "decode_dump_stats",
    "dump_stats",
    "restore_stats",
    "stats_image",
]

STATS_DUMP: Final = "stats-dump"
STATS_RESTORE: Final = "stats-restore"
"""The files' names."""

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


def restore_stats(*, pages: int, forking: float, total: float) -> RestoreStatsEntry:
    """Return the statistics of a restore.

    Pages compared and skipped are zero: ovr compares no pages with a parent's.

    Args:
        pages: number of pages restored, outside and inside.
        forking: seconds until the skeleton was complete.
        total: seconds of the whole restore.
    """
    return RestoreStatsEntry(
        pages_compared=0,
        pages_skipped_cow=0,
        forking_time=_microseconds(forking),
        restore_time=_microseconds(total),
        pages_restored=pages,
    )


def dump_stats(data: bytes, *, written: int, skipped: int, memory: float) -> DumpStatsEntry:
    """Return the statistics of a dump whose pages the host has read.

    CRIU counts these pages as skipped, because they are in the parent image set that it was given,
    and its times are without theirs. Only the time in which the tree was frozen is whole: it ends
    after the post-dump hook, in which the host reads. CRIU counts shared memory apart.

    Args:
        data: ``stats-dump`` of the guest's CRIU; empty if there is none.
        written: number of private pages in these images.
        skipped: number of private pages in the images that these build on.
        memory: seconds in which the host read pages and wrote them.

    Raises:
        ImagesDamaged, ImagesUnsupported: it is invalid.
    """
    if data:
        stats = copy_of(decode_dump_stats(data))
    else:
        stats = DumpStatsEntry(freezing_time=0, frozen_time=0, pages_scanned=0)
    stats.memdump_time = _microseconds(stats.memdump_time / 1e6 + memory)
    stats.memwrite_time = _microseconds(stats.memwrite_time / 1e6 + memory)
    stats.pages_skipped_parent = skipped
    stats.pages_written = written
    stats.pages_lazy = 0
    return stats


def decode_dump_stats(data: bytes) -> DumpStatsEntry:
    """Return the content of a ``stats-dump``.

    Raises:
        ImagesDamaged, ImagesUnsupported: it is invalid.
    """
    found = [decode(StatsEntry, frame.payload, STATS_DUMP) for frame in frames(data, STATS_DUMP)]
    if len(found) != 1 or not found[0].HasField("dump"):
        raise ImagesDamaged(f"{STATS_DUMP} has no statistics of one dump")
    return found[0].dump


def stats_image(stats: RestoreStatsEntry | DumpStatsEntry) -> bytes:
    """Return the content of the file that has these statistics."""
    if isinstance(stats, DumpStatsEntry):
        return image_bytes(STATS_DUMP, [encode(StatsEntry(dump=stats))])
    return image_bytes(STATS_RESTORE, [encode(StatsEntry(restore=stats))])


def _microseconds(seconds: float) -> int:
    return min(round(seconds * 1e6), _UINT32_MAX)
