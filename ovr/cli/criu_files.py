"""The files that ``criu restore`` leaves: log, pidfile, ``stats-restore``.

As CRIU has it, relative names are in the work directory, which is the images' without ``-W``.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ovr.addresses import PAGE_SIZE
from ovr.cli.logs import log_to_file
from ovr.errors import OvrError, UsageError
from ovr.images.framing import write_image
from ovr.images.stats import STATS_RESTORE, stats_image
from ovr.report import Report

__all__ = ["criu_files", "stats_text"]

_ROOM: Final = b"\n" * 10

log = logging.getLogger("ovr.restore")


@contextmanager
def criu_files(
    work: Path, *, log_file: str | None, level: int, pidfile: str | None
) -> Iterator[Callable[[Report], None]]:
    """Open log and pidfile for the body of the ``with``; call what it gives with the report.

    An error in the body goes to the log, and leaves no pidfile.

    Args:
        work: the work directory.
        log_file: name of the log, None for stderr.
        level: CRIU's log level.
        pidfile: name of the pidfile, None for none; it must be new.

    Raises:
        UsageError: a file cannot be made.
    """
    if log_file is not None:
        with _usage("log file", work / log_file):
            log_to_file(work / log_file, level)
    path = None if pidfile is None else work / pidfile
    if path is not None:
        with _usage("pidfile", path):
            # As CRIU does it: a pidfile that exists may be somebody's who lives.
            _reserve(path)
    try:
        yield lambda report: _finish(report, work, path)
    except BaseException as error:
        if path is not None:
            path.unlink(missing_ok=True)
        if log_file is not None:
            _log_failure(error)
        raise


def _reserve(path: Path) -> None:
    # With room for a pid, since there is no way back once the tree runs.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(fd, _ROOM)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(fd)


def stats_text(report: Report) -> str:
    """Return what ``--display-stats`` shows, as CRIU shows it."""
    pages = report.bytes_total // PAGE_SIZE
    lines = (
        "Displaying restore stats:",
        "Pages compared: 0 (0x0)",
        "Pages skipped COW: 0 (0x0)",
        f"Pages restored: {pages} ({pages:#x})",
        f"Restore time: {round(report.seconds['total'] * 1e6)} us",
        f"Forking time: {round(report.seconds['skeleton'] * 1e6)} us",
    )
    return "\n".join(lines)


def _finish(report: Report, work: Path, pidfile: Path | None) -> None:
    if pidfile is not None:
        with pidfile.open("r+") as file:  # in the room that is there
            file.write(str(report.pid))
            file.truncate()
    stats = stats_image(
        pages=report.bytes_total // PAGE_SIZE,
        forking=report.seconds["skeleton"],
        total=report.seconds["total"],
    )
    try:
        write_image(work, STATS_RESTORE, [stats])
    except OSError as error:  # the tree runs: to CRIU too this is no failure
        log.warning("no %s in %s: %s", STATS_RESTORE, work, error.strerror)
    log.info("Restore finished successfully. Tasks resumed.")


def _log_failure(error: BaseException) -> None:
    for note in getattr(error, "__notes__", ()):
        for line in note.splitlines():  # the guest's CRIU
            log.error("guest: %s", line)
    hint = f" ({error.hint})" if isinstance(error, OvrError) and error.hint else ""
    log.error("%s%s", str(error) or type(error).__name__, hint)
    log.error("Restoring FAILED.")


@contextmanager
def _usage(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"the {what} {path} cannot be made: {reason}") from error
