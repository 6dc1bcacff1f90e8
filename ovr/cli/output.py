"""Common options of commands, results on stdout, errors on stderr."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ovr.cli.terminal import painted
from ovr.errors import OvrError

__all__ = [
    "common",
    "document",
    "error",
    "give_up_stdout",
    "json_option",
    "one_line",
    "printed",
    "size",
    "table",
]


def common(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command has."""
    json_option(parser)
    parser.add_argument(
        "-v", dest="verbose", action="count", default=0, help="log more on stderr (-vv: all)"
    )


def json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def document(schema: str, fields: Mapping[str, Any]) -> None:
    """Print a JSON object with its ``schema``."""
    print(json.dumps({"schema": schema, **fields}))


def error(problem: OvrError, *, as_json: bool) -> None:
    """Report `problem` in one line; with `as_json` also as an object on stdout."""
    cure = f" ({problem.hint})" if problem.hint else ""
    print(
        f"{painted('ovr:', 'bad', sys.stderr)} {one_line(str(problem))}{one_line(cure)}",
        file=sys.stderr,
    )
    fields = {
        "kind": problem.kind,
        "message": str(problem),
        "hint": problem.hint,
        "code": problem.code,
        "exit_code": problem.exit_code,
        "undone": list(problem.undone),
        "move": problem.move,
    }
    if as_json:
        with printed("it ended with this error"):
            document("ovr.error/1", fields)


@contextmanager
def printed(known: str) -> Iterator[None]:
    """Print in the body of the ``with``; report a full stdout on stderr instead of failing.

    Args:
        known: the fact to report, because the output that states it is lost.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up_stdout()
        print(f"ovr: {known}, but that cannot be printed: {error.strerror}", file=sys.stderr)


def give_up_stdout() -> None:
    """Discard unprinted output: at exit Python would try to print it again, and fail."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print left-aligned columns, as ps(1) does."""
    cells = [[one_line(str(cell)) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        columns = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(columns).rstrip())


def size(count: int) -> str:
    """Return a number of bytes in a readable form: ``1.5 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def one_line(text: str) -> str:
    """Return `text` as one line without control characters.

    Texts may contain parts from a guest, or from another user's command line.
    """
    return "".join(char if char.isprintable() else "?" for char in text.replace("\n", " "))
