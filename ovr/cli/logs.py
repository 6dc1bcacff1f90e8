"""Write logs in CRIU's format, for readers and scripts that expect it.

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
"""CRIU's levels: 0 nothing, 1 errors, 2 also warnings, 3 also information, 4 all."""

_LEVELS: Final = (logging.CRITICAL + 1, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
_ROOT: Final = Path(__file__).parents[2]


class _Formatter(logging.Formatter):
    # Seconds count from here, because a standby process was started long before.
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
        # Split only at "\n": other line separators may come from a guest.
        return "\n".join(start + one_line(line) for line in text.split("\n"))


class _File(logging.StreamHandler[TextIO]):
    # A full disk does not end a restore: it is reported once, and further lines are lost.
    reported = False

    def __init__(self, fd: int, path: Path) -> None:
        super().__init__(os.fdopen(fd, "w", encoding="utf-8"))
        self._path = path

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.reported:
            self.reported = True
            reason = f"{self._path} cannot be written: {error.strerror}"
            print(f"ovr: the log {reason} (free space there)", file=sys.stderr)

    def close(self) -> None:
        with suppress(OSError):  # from lines that could not be written before
            self.stream.close()
        super().close()


def log_to_stderr(level: int) -> None:
    """Log to stderr, up to CRIU's `level`."""
    _log(logging.StreamHandler(sys.stderr), level)


def log_to_file(path: Path, level: int) -> None:
    """Log to a file at `path` instead, up to CRIU's `level`; previous content is lost.

    A new file is readable for this user only, as CRIU's: it has details of the guest's processes.

    Raises:
        UntrustedPath: another user controls the path.
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
