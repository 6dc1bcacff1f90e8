"""Parts of the commands that run CRIU: ``ovr restore``, ``ovr dump`` and ``ovr move``."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ovr.cli.criu_config import unread_options
from ovr.cli.criu_options import add_verbosity
from ovr.cli.progress import PROGRESS_MODES
from ovr.dump import AS_MANY_AS_HELP
from ovr.errors import CriuFailed, UsageError

__all__ = [
    "add_files",
    "add_progress",
    "add_timeout",
    "add_tree",
    "config_in_hints",
    "missed_options",
    "pid_of",
    "progress_mode",
    "rounds_of",
    "work_directory",
]

_DAY: Final = 86_400
_PID_MAX_LIMIT: Final = 1 << 22


def add_tree(parser: argparse.ArgumentParser) -> None:
    """Add ``-t``; `pid_of` reads it."""
    parser.add_argument(
        "-t", "--tree", metavar="PID",
        help="the root task, by its pid in the guest (`ovr ps` shows them)",
    )  # fmt: skip


def pid_of(text: str) -> int:
    """Return a pid of the guest.

    Raises:
        UsageError: it is none.
    """
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < _PID_MAX_LIMIT):
        raise UsageError(f"{text!r} is not a pid", "ovr ps shows the guest's processes")
    return int(text)


def rounds_of(text: str) -> int:
    """Return a number of rounds of pre-copies: ``auto`` or a number.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    if text == "auto":
        return AS_MANY_AS_HELP
    if not (text.isascii() and text.isdecimal() and len(text) < 3):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto or a number below 100")
    return int(text)


def add_timeout(parser: argparse.ArgumentParser, work: str) -> None:
    """Add ``--timeout``.

    Args:
        parser: of the command.
        work: the work of the guest that it limits.
    """
    parser.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS",
        help=f"limit for the guest to {work} (default: none while it makes progress)",
    )  # fmt: skip


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.001 <= value <= _DAY:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to {_DAY}, a day")
    return value


def add_files(parser: argparse.ArgumentParser, files: str, stats: str) -> None:
    """Add the options of the files that CRIU leaves, and ``-v`` and ``--report``.

    Args:
        parser: of the command.
        files: the files in the work directory.
        stats: name of the statistics' file.
    """
    parser.add_argument(
        "-W", "--work-dir", type=Path, metavar="DIR",
        help=f"directory for {files} (default: the images' directory)",
    )  # fmt: skip
    parser.add_argument("-o", "--log-file", metavar="FILE", help="log there, not to stderr")
    add_verbosity(parser)
    parser.add_argument(
        "--report", type=Path, metavar="FILE.html", help="draw phases, holds and bytes in this file"
    )
    parser.add_argument(
        "--display-stats", action=argparse.BooleanOptionalAction, default=False,
        help=f"show the content of {stats}",
    )  # fmt: skip


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Add ``--progress``."""
    parser.add_argument(
        "--progress", choices=PROGRESS_MODES, default="auto",
        help="on stderr: a bar, JSON lines, or none; auto is a bar on a terminal",
    )  # fmt: skip


def progress_mode(options: argparse.Namespace) -> str:
    """Return one of `PROGRESS_MODES`: no bar among log lines."""
    logging_here = options.verbose and options.log_file is None
    return "none" if options.progress == "auto" and logging_here else str(options.progress)


def work_directory(options: argparse.Namespace, images: Path | None) -> Path:
    """Return the directory of the files that CRIU leaves.

    Args:
        options: the command's.
        images: the images' directory, if there is one.

    Raises:
        UsageError: it is not a directory.
    """
    if options.work_dir and not options.work_dir.is_dir():
        raise UsageError(
            f"{options.work_dir} is not a directory", "create it, or name another with -W"
        )
    return options.work_dir or images or Path()


@contextmanager
def config_in_hints(options: argparse.Namespace, command: str) -> Iterator[None]:
    """Add options of the guest's configuration files to the hint of an error in the body.

    CRIU may have failed because they were not read.
    """
    try:
        yield
    except CriuFailed as error:
        if missed := missed_options(error.unread_config, options, command):
            error.hint = f"{error.hint}; {missed}" if error.hint else missed
        raise


def missed_options(files: Mapping[str, str], options: argparse.Namespace, command: str) -> str:
    """Return a sentence on the options in the guest's configuration files; empty if there are none.

    Args:
        files: the files' texts by path.
        options: the command's.
        command: ``restore`` or ``dump``.
    """
    given: Sequence[str] = options.criu_options
    unread = unread_options(files, given, command)
    if options.no_default_config or not unread.cure:
        return ""
    return f"{unread.fact}: {unread.cure}"
