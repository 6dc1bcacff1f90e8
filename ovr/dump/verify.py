"""Compare pages images that were written with the tree's memory."""

import mmap
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from ovr.attempt.attempt import Attempt
from ovr.attempt.sink import Sink
from ovr.attempt.targets import Target
from ovr.images.source import Source

__all__ = ["verify_pages"]


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
            [replace(target, source=_as_source(target.source, stack)) for target in targets], mode
        )


def _as_source(sink: Source | Sink, stack: ExitStack) -> Source:
    assert isinstance(sink, Sink)
    if not sink.size:
        return Source(sink.name, memoryview(b""), sink.fd, 0)
    pages = stack.enter_context(mmap.mmap(sink.fd, sink.size, access=mmap.ACCESS_READ))
    view = memoryview(pages)
    stack.callback(view.release)
    return Source(sink.name, view, sink.fd, 0)
