"""The directory of this user's cached files, with a subdirectory for each room."""

import os
from pathlib import Path

from ovr.errors import LabError
from ovr.host import Directory

__all__ = ["own_cache", "user_cache"]


def user_cache() -> Path:
    """Return ``$XDG_CACHE_HOME/ovr`` or ``~/.cache/ovr``; it may be missing or untrusted."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ovr"


def own_cache(room: str = "") -> Path:
    """Return the directory `room` of the cache, made if new: no other user can write to it.

    Nor can another user replace a component of its path, so its files may be used by path.

    Raises:
        LabError: another user can change it, or it cannot be made.
    """
    path = user_cache() / room
    try:
        with Directory.private(path, create=True):
            return path
    except OSError as error:
        raise LabError(
            f"the cache {path} cannot be used: {error.strerror}",
            "set XDG_CACHE_HOME to a directory of your own",
        ) from error
