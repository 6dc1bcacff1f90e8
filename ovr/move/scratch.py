"""The directory of a move's images on the host, which is removed even if `ovr` is killed.

Images hold memory of the guest. A directory has a lock for as long as a process of the move lives;
what is left of one that was killed has none, and the next move or decision removes it.
"""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from ovr.dump.output import writable

__all__ = ["scratch_directory", "sweep"]

_MEMORY: Final = Path("/dev/shm")
"""The images have no memory that goes outside, and are removed at the end."""
_PREFIX: Final = "ovr-move-"
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def scratch_directory(place: Path | None = None) -> Iterator[Path]:
    """Make a directory that only this user can use, and remove it at the end.

    Those of this user's moves that were killed are removed first.

    Args:
        place: its parent; None: a file system in memory.

    Raises:
        UsageError: it cannot be made.
    """
    place = place or _MEMORY
    sweep(place)
    with writable(place):
        path, lock = _make(place)
    try:
        yield path
    finally:
        # Removed under its lock: nobody sweeps it meanwhile.
        try:
            shutil.rmtree(path)
        finally:
            os.close(lock)


def sweep(place: Path | None = None) -> None:
    """Remove the directories of moves that were killed, of this user.

    What other users have put there under such a name is not touched.

    Args:
        place: as for `scratch_directory`.
    """
    for path in (place or _MEMORY).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, in use, or removed by another sweep
            _remove_if_unused(path)


def _make(place: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        with suppress(FileNotFoundError):  # swept before it had its lock
            lock = os.open(path, _OPEN)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(lock, path):
                return path, lock
            os.close(lock)


def _remove_if_unused(path: Path) -> None:
    lock = os.open(path, _OPEN)
    try:
        found = os.fstat(lock)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != stat.S_IRWXU:
            return
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(lock, path):
            shutil.rmtree(path)
    finally:
        os.close(lock)


def _is_at(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.lstat())
    except FileNotFoundError:
        return False
