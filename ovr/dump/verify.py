"""Compare pages images that were written with the tree's memory."""

import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ovr.attempt.attempt import Attempt
from ovr.attempt.sink import Sink
from ovr.attempt.targets import Target
from ovr.images.source import Source

__all__ = ["verify_pages", "written"]


def verify_pages(attempt: Attempt, targets: Sequence[Target], mode: str) -> int:
    """Compare pages with what was saved; return the bytes compared.

    Args:
        attempt: holds the tree.
        targets: what was saved.
        mode: none of the pages, a ``sample``, or all (``full``).

    Raises:
        VerifyMismatch: a page is not as in the image.
        AttemptFailed: a page is not there, and stays away.
    """
    if mode == "none":
        return 0
    with ExitStack() as stack:
        return attempt.copier(lambda count: None).verify(
            [replace(target, source=_source_of(target, stack)) for target in targets], mode
        )


def _source_of(target: Target, stack: ExitStack) -> Source:
    if isinstance(target.source, Sink):
        return _mapped(target.source.name, os.dup(target.source.fd), stack)
    assert isinstance(target.source, Source)
    return target.source


def written(image: Path, stack: ExitStack) -> Source:
    """Return a pages image that was written, to be read again."""
    return _mapped(image.name, os.open(image, os.O_RDONLY | os.O_CLOEXEC), stack)


def _mapped(name: str, fd: int, stack: ExitStack) -> Source:
    stack.callback(os.close, fd)
    pages = stack.enter_context(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
    view = memoryview(pages)
    stack.callback(view.release)
    return Source(name, view, fd, 0)
