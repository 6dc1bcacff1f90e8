"""The kinds of state that are written from outside, one module a kind."""

from typing import Final

from ovr.state.kind import InsideTask, Kind
from ovr.state.umask import Umask

__all__ = ["KINDS", "InsideTask", "Kind"]

KINDS: Final[tuple[Kind, ...]] = (Umask(),)
"""All kinds but memory, which comes in pages and has a module of its own."""
