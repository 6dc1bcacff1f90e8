"""Work divided among threads, none of which works on after the call."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Final, TypeVar

from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.extents import Extents, split, total

__all__ = ["Threads"]

_SHARE: Final = 1 << 20  # bytes worth a thread
_LARGE_SHARE: Final = 4 << 20  # more shares than threads if they are as large: they end together

S = TypeVar("S")
T = TypeVar("T")


class Threads:
    """Divides work among threads.

    Args:
        pool: runs the threads.
        count: number of threads to use.
    """

    def __init__(self, pool: Executor, count: int) -> None:
        self._pool = pool
        self._count = count

    def on_parts(self, runs: Extents, work: Callable[[Extents], T]) -> list[T]:
        """Do the work on parts of `runs`; return the results in their order."""
        # Parts of whole pages: page tables are walked for them.
        pages = -(-total(runs) // (self._count * PAGE_SIZE))
        share = max(pages * PAGE_SIZE, _SHARE)
        if share >= 4 * _LARGE_SHARE:
            share = pages // 4 * PAGE_SIZE
        return self.on_each(list(split(runs, share)), work)

    def on_each(self, shares: Sequence[S], work: Callable[[S], T]) -> list[T]:
        """Do the work on each share; return the results in their order.

        No thread works on after this, even if it ends by an error or Ctrl-C.
        """
        if len(shares) < 2:
            return [work(one) for one in shares]
        futures = [self._pool.submit(work, one) for one in shares]
        try:
            return [future.result() for future in futures]
        finally:
            _await_all(futures)


def _await_all(futures: Sequence[Future[T]]) -> None:
    # Neither an error nor Ctrl-C may end the hold while a thread still writes.
    interrupted: BaseException | None = None
    while any(not future.done() for future in futures):
        try:
            wait(futures)
        except BaseException as error:
            interrupted = error
    if interrupted:
        raise interrupted
