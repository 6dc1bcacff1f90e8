"""Whether a stream is a terminal, how wide it is, and the colours that are used."""

import os
import shutil
import textwrap
from collections.abc import Mapping
from typing import Final, TextIO

__all__ = ["fitted", "is_lively", "painted"]

_CODES: Final[Mapping[str, str]] = {"good": "32", "bad": "31", "dim": "2"}


def is_lively(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can move its cursor (``TERM`` is not ``dumb``)."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def painted(text: str, mood: str, stream: TextIO) -> str:
    """Return `text` in the colour of ``good``, ``bad`` or ``dim``, where the stream takes colours.

    It does not if it is no terminal, or if ``NO_COLOR`` is set to anything (https://no-color.org).
    """
    if os.environ.get("NO_COLOR") or not is_lively(stream):
        return text
    return f"\x1b[{_CODES[mood]}m{text}\x1b[0m"


def fitted(text: str, stream: TextIO) -> str:
    """Return a line broken between words to the width of the terminal; elsewhere as it is."""
    if not is_lively(stream):
        return text
    width = shutil.get_terminal_size().columns
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)
