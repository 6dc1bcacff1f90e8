"""Detect terminals, and fit and colour text for them."""

import os
import shutil
import textwrap
from collections.abc import Mapping
from typing import Final, TextIO

__all__ = ["fitted", "is_lively", "painted"]

_CODES: Final[Mapping[str, str]] = {"good": "32", "bad": "31", "dim": "2"}


def is_lively(stream: TextIO) -> bool:
    """Return whether the stream is a terminal with cursor control (``TERM`` is not ``dumb``)."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def painted(text: str, mood: str, stream: TextIO) -> str:
    """Return `text` in the colour of ``good``, ``bad`` or ``dim`` if the stream supports colours.

    It does not if it is not a terminal, or if ``NO_COLOR`` is set (https://no-color.org).
    """
    if os.environ.get("NO_COLOR") or not is_lively(stream):
        return text
    return f"\x1b[{_CODES[mood]}m{text}\x1b[0m"


def fitted(text: str, stream: TextIO) -> str:
    """Return a line wrapped to the width of the terminal; unchanged for other streams."""
    if not is_lively(stream):
        return text
    width = shutil.get_terminal_size().columns
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)
