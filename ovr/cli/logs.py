"""Logs in the form that CRIU's have, for eyes and scripts that know those.

::

    (00.012345) Error (ovr/restore/story.py:120): restore: what went wrong
"""

import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, TextIO

from ovr.cli.output import one_line
from ovr.host import locate

__all__ = ["DEFAULT_LEVEL", "log_to_file", "log_to_stderr"]

DEFAULT_LEVEL: Final = 2
"""CRIU's numbers: 0 nothing, 1 errors, 2 warnings too, 3 information too, 4 all."""

_LEVELS: Final = (logging.CRITICAL + 1, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
_ROOT: Final = Path(__file__).parents[2]


class _Formatter(logging.Formatter):
    # Seconds since the command began to log: this process may have been loaded long before.
    def __init__(self) -> None:
        super().__init__()
        self._begin = time.time()

    def format(self, record: logging.LogRecord) -> str:
        area = record.name.removeprefix("ovr.")
        text = f"{area}: {record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        seconds = max(record.created - self._begin, 0.0)
        start = f"({seconds:09.6f}) {_mark(record)}"
        # At "\n" alone: what else a terminal takes for a new line may be a guest's.
        return "\n".join(start + one_line(line) for line in text.split("\n"))


class _File(logging.StreamHandler[TextIO]):
    # A disk that is full is no reason to end a restore: said once, and the rest is lost.
    complained = False

    def __init__(self, fd: int, path: Path) -> None:
        super().__init__(os.fdopen(fd, "w", encoding="utf-8"))
        self._path = path

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.complained:
            self.complained = True
            reason = f"{self._path} cannot be written: {error.strerror}"
            print(f"ovr: the log {reason} (free space there)", file=sys.stderr)

    def close(self) -> None:
        with suppress(OSError):  # of what could not be written before
            self.stream.close()
        super().close()


def log_to_stderr(level: int) -> None:
    """Log to stderr, up to CRIU's `level`."""
    _log(logging.StreamHandler(sys.stderr), level)


def log_to_file(path: Path, level: int) -> None:
    """Log to a file at `path` instead, up to CRIU's `level`; what is in it is lost.

    A new one is for this user alone, as CRIU's is: the guest's CRIU tells about its processes.

    Raises:
        UntrustedPath: another user decides, or could decide, which file that is.
        OSError: it cannot be written.
    """
    directory, name = locate(path)
    with directory:
        handler = _File(directory.overwrite(name, 0o600), path)
    _log(handler, level)


def _log(handler: logging.Handler, level: int) -> None:
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=_LEVELS[min(max(level, 0), 4)], handlers=[handler], force=True)


def _mark(record: logging.LogRecord) -> str:
    if record.levelno < logging.WARNING:
        return ""
    word = "Error" if record.levelno >= logging.ERROR else "Warn "
    path = Path(record.pathname)
    place = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path.name
    return f"{word} ({place}:{record.lineno}): "
