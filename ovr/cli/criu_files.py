"""Write the files that CRIU leaves: log, pidfile, ``stats-restore`` or ``stats-dump``.

As in CRIU, relative names are in the work directory, by default the images' directory. Unlike CRIU,
no file is written if another user controls its path (`ovr.host`).
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, Self

from ovr.cli.logs import log_to_file
from ovr.errors import OvrError, UsageError
from ovr.host import UntrustedPath, cure_of, locate
from ovr.images.framing import write_image
from ovr.images.stats import (
    STATS_DUMP,
    STATS_RESTORE,
    DumpStatsEntry,
    RestoreStatsEntry,
    stats_image,
)

__all__ = [
    "DUMPING",
    "RESTORING",
    "Job",
    "criu_files",
    "dump_stats_text",
    "logged",
    "restore_stats_text",
]

_ROOM: Final = b"\n" * 10
_ELSEWHERE: Final = "name a work directory with -W DIR, or the file by a path in another one"
_OWN_PATH: Final = "name a work directory of your own with -W DIR, or the file by a path in one"


class Job(NamedTuple):
    """A command of CRIU's: its log, the name of its statistics' file, the last lines of its log."""

    log: logging.Logger
    stats: str
    done: str
    failed: str


RESTORING: Final = Job(
    logging.getLogger("ovr.restore"), STATS_RESTORE,
    "Restore finished successfully. Tasks resumed.", "Restoring FAILED.",
)  # fmt: skip
DUMPING: Final = Job(
    logging.getLogger("ovr.dump"), STATS_DUMP, "Dumping finished successfully", "Dumping FAILED."
)


Stats = RestoreStatsEntry | DumpStatsEntry


@contextmanager
def criu_files(
    work: Path, job: Job, *, log_file: str | None, level: int, pidfile: str | None = None
) -> Iterator[Callable[[Stats, int], None]]:
    """Open log and pidfile for the body of the ``with``.

    Call the yielded function with the statistics and the root task's pid when the job is done. An
    error in the body is logged, and removes the pidfile.

    Args:
        work: the work directory.
        job: the command of CRIU's.
        log_file: name of the log, None for stderr.
        level: CRIU's log level.
        pidfile: name of the pidfile, None for none; it must be new.

    Raises:
        UsageError: a file cannot be made.
    """
    with ExitStack() as stack:
        if log_file is not None:
            stack.enter_context(logged(work / log_file, level, job.log, job.failed))
        reserved = None
        if pidfile is not None:
            with _usage("pidfile", work / pidfile):
                reserved = stack.enter_context(_Pidfile(work / pidfile))
        try:
            yield partial(_finish, work, job, reserved)
        except BaseException:
            if reserved is not None:
                reserved.remove()
            raise


@contextmanager
def logged(path: Path, level: int, log: logging.Logger, failed: str) -> Iterator[None]:
    """Log to a file, from here on, and log an error in the body of the ``with``.

    Args:
        path: the file.
        level: CRIU's log level.
        log: gets the error.
        failed: the last line after an error.

    Raises:
        UsageError: the file cannot be made.
    """
    with _usage("log file", path):
        log_to_file(path, level)
    try:
        yield
    except BaseException as error:
        _log_failure(error, log, failed)
        raise


class _Pidfile:
    # Space for the pid is allocated at once: after the tree runs, a full disk could not be handled.
    def __init__(self, path: Path) -> None:
        self._directory, self._name = locate(path)
        try:
            # Must be new, as for CRIU: an existing pidfile may belong to a live process.
            self._fd = self._directory.create(self._name, 0o644)
        except BaseException:
            self._directory.close()
            raise
        try:
            os.write(self._fd, _ROOM)
        except BaseException:
            self.remove()
            self.__exit__()
            raise

    def write(self, pid: int) -> None:
        text = str(pid).encode()
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))

    def remove(self) -> None:
        self._directory.remove(self._name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        self._directory.close()


def restore_stats_text(stats: RestoreStatsEntry) -> str:
    """Return the output of ``criu restore --display-stats``."""
    lines = (
        "Displaying restore stats:",
        f"Pages compared: {_count(stats.pages_compared)}",
        f"Pages skipped COW: {_count(stats.pages_skipped_cow)}",
        f"Pages restored: {_count(stats.pages_restored)}",
        f"Restore time: {stats.restore_time} us",
        f"Forking time: {stats.forking_time} us",
    )
    return "\n".join(lines)


def dump_stats_text(stats: DumpStatsEntry) -> str:
    """Return the output of ``criu dump --display-stats``."""
    irmap = (f"IRMAP resolve time: {stats.irmap_resolve} us",)
    lines = (
        "Displaying dump stats:",
        f"Freezing time: {stats.freezing_time} us",
        f"Frozen time: {stats.frozen_time} us",
        f"Memory dump time: {stats.memdump_time} us",
        f"Memory write time: {stats.memwrite_time} us",
        *(irmap if stats.HasField("irmap_resolve") else ()),
        f"Memory pages scanned: {_count(stats.pages_scanned)}",
        f"Memory pages skipped from parent: {_count(stats.pages_skipped_parent)}",
        f"Memory pages written: {_count(stats.pages_written)}",
        f"Lazy memory pages: {_count(stats.pages_lazy)}",
    )
    return "\n".join(lines)


def _count(pages: int) -> str:
    return f"{pages} ({pages:#x})"


def _finish(work: Path, job: Job, pidfile: _Pidfile | None, stats: Stats, pid: int) -> None:
    if pidfile is not None:
        pidfile.write(pid)
    try:
        write_image(work, job.stats, [stats_image(stats)])
    except OSError as error:  # not a failure, as in CRIU: the job is done
        job.log.warning("no %s in %s: %s (%s)", job.stats, work, error.strerror, _cure(error))
    job.log.info("%s", job.done)


def _log_failure(error: BaseException, log: logging.Logger, failed: str) -> None:
    for note in getattr(error, "__notes__", ()):
        for line in note.splitlines():  # the guest's CRIU
            log.error("guest: %s", line)
    hint = f" ({error.hint})" if isinstance(error, OvrError) and error.hint else ""
    log.error("%s%s", str(error) or type(error).__name__, hint)
    log.error("%s", failed)


@contextmanager
def _usage(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"the {what} {path} cannot be made: {reason}", _cure(error)) from error


def _cure(error: OSError) -> str:
    if isinstance(error, UntrustedPath):
        return _OWN_PATH
    if isinstance(error, FileExistsError):
        return "remove it if the process that it names has ended, or name another file"
    return cure_of(error, _ELSEWHERE)
