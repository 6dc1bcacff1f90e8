"""The lab's cache of images, kernels and programs, each built once, completely or not at all.

The name of an entry, a directory or file, has a digest of its ingredients. It is built beside its
place and renamed under a lock, so that builders may race and die.
"""

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ovr.host.user_cache import own_cache

__all__ = ["cache_directory", "cached", "digest"]


def cache_directory() -> Path:
    """Return the lab's cache directory (``$XDG_CACHE_HOME/ovr``, ``~/.cache/ovr``), made if new.

    Raises:
        LabError: another user can change it.
    """
    return own_cache()


def digest(*ingredients: str | bytes) -> str:
    """Return a short name for exactly these ingredients."""
    total = hashlib.sha256()
    for one in ingredients:
        data = one.encode() if isinstance(one, str) else one
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:16]


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Return the cache entry `name`; if there is none, `build` makes it.

    Args:
        name: one path component that names the ingredients.
        build: called with an empty directory of its own; its content becomes the entry.

    Raises:
        LabError: the errors of `build`.
    """
    entry = cache_directory() / name
    if entry.exists():
        return entry
    with _lock(cache_directory() / f".{name}.lock"):
        if entry.exists():
            return entry
        for stale in cache_directory().glob(f".{name}.tmp-*"):  # its builder died
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=cache_directory()))
        try:
            build(work)
            work.rename(entry)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return entry


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
