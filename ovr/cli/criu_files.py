"""Write the files that ``criu restore`` leaves: log, pidfile, ``stats-restore``.

As in CRIU, relative names are in the work directory, by default the images' directory. Unlike CRIU,
no file is written if another user controls its path (`ovr.host`).
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Self

from ovr.cli.logs import log_to_file
from ovr.errors import OvrError, UsageError
from ovr.host import UntrustedPath, cure_of, locate
from ovr.images.framing import write_image
from ovr.images.stats import STATS_RESTORE, stats_image
from ovr.memory.addresses import PAGE_SIZE
from ovr.restore.report import Report

__all__ = ["criu_files", "stats_text"]

_ROOM: Final = b"\n" * 10
_ELSEWHERE: Final = "name a work directory with -W DIR, or the file by a path in another one"
_OWN_PATH: Final = "name a work directory of your own with -W DIR, or the file by a path in one"

log = logging.getLogger("ovr.restore")


@contextmanager
def criu_files(
    work: Path, *, log_file: str | None, level: int, pidfile: str | None
) -> Iterator[Callable[[Report], None]]:
    """Open log and pidfile for the body of the ``with``; call the yielded function with the report.

    An error in the body is logged, and removes the pidfile.

    Args:
        work: the work directory.
        log_file: name of the log, None for stderr.
        level: CRIU's log level.
        pidfile: name of the pidfile, None for none; it must be new.

    Raises:
        UsageError: a file cannot be made.
    """
    with ExitStack() as stack:
        if log_file is not None:
            with _usage("log file", work / log_file):
                log_to_file(work / log_file, level)
        reserved = None
        if pidfile is not None:
            with _usage("pidfile", work / pidfile):
                reserved = stack.enter_context(_Pidfile(work / pidfile))
        try:
            yield lambda report: _finish(report, work, reserved)
        except BaseException as error:
            if reserved is not None:
                reserved.remove()
            if log_file is not None:
                _log_failure(error)
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


def stats_text(report: Report) -> str:
    """Return the output of ``--display-stats``, in CRIU's format."""
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


def _finish(report: Report, work: Path, pidfile: _Pidfile | None) -> None:
    if pidfile is not None:
        pidfile.write(report.pid)
    stats = stats_image(
        pages=report.bytes_total // PAGE_SIZE,
        forking=report.seconds["skeleton"],
        total=report.seconds["total"],
    )
    try:
        write_image(work, STATS_RESTORE, [stats])
    except OSError as error:  # not a failure, as in CRIU: the tree runs
        hint = _cure(error)
        log.warning("no %s in %s: %s (%s)", STATS_RESTORE, work, error.strerror, hint)
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
        raise UsageError(f"the {what} {path} cannot be made: {reason}", _cure(error)) from error


def _cure(error: OSError) -> str:
    if isinstance(error, UntrustedPath):
        return _OWN_PATH
    if isinstance(error, FileExistsError):
        return "remove it if the process that it names has ended, or name another file"
    return cure_of(error, _ELSEWHERE)
