"""Where this user's cached files are; each room has a directory of its own in there."""

import os
from pathlib import Path

__all__ = ["user_cache"]


def user_cache() -> Path:
    """Return ``$XDG_CACHE_HOME/ovr`` or ``~/.cache/ovr``; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ovr"
