"""Copy pages of a stopped tree from their frames into pages images.

What a page table shows in a hold is what the task sees, whoever else has the frame: no owner is
asked for. Pages that are not there (in swap, on the move, never looked at) are looked up again
after the guest was asked to read them.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from ovr._fastcopy import OWNED
from ovr.attempt.in_holds import ANY_OWNER, InHolds, Look, Ready
from ovr.attempt.sink import Buffers, Drain, Sink
from ovr.attempt.targets import Target
from ovr.memory.extents import Extents, total
from ovr.vm.hold import Holder

__all__ = ["Saver"]


class Saver(InHolds[Drain]):
    """Saves memory.

    Args:
        holder: holds the VM.
        pool: runs host threads for the copy.
        threads: number of threads to use in one hold.
        advance: called with the size of every copy in bytes.
    """

    def __init__(
        self, holder: Holder, pool: Executor, threads: int, advance: Callable[[int], None]
    ) -> None:
        super().__init__(holder, pool, threads)
        self._advance = advance
        self._buffers = Buffers()

    def save(self, targets: Sequence[Target]) -> None:
        """Copy all pages of the targets into their sinks.

        Raises:
            AttemptFailed: some pages are not there, and stay away.
            GuestFault: page tables of the guest are damaged.
            OSError: a sink's file system is full, or fails.
        """
        parts = [(target, target.pieces) for target in targets]
        for batch in self._batches(parts):
            self._each_run(batch, _copy, ANY_OWNER, after=self._note)

    def save_own(self, target: Target, saved: Look) -> None:
        """Copy pages of a running task into its sink, but for those that are not its own.

        Args:
            target: the task.
            saved: called after each hold with the runs that were copied in it.

        Raises:
            AttemptFailed: the task has died.
            GuestFault: page tables of the guest are damaged.
            OSError: the sink's file system is full, or fails.
        """

        def after(target: Target, runs: Extents) -> None:
            saved(target, runs)
            self._note(target, runs)

        for batch in self._batches([(target, target.pieces)]):
            self._each_run(batch, _copy, OWNED, after=after, again=False)

    def _make_ready(self, target: Target, part: Extents, *, aside: bool) -> Drain:
        assert isinstance(target.source, Sink)
        return Drain.make(target.source, part, self._buffers)

    def _after_hold(self, done: Sequence[tuple[Ready[Drain], Extents]]) -> None:
        self._threads.on_each(done, lambda one: one[0].pages.flush(one[1], self._buffers))

    def _note(self, target: Target, runs: Extents) -> None:
        self._advance(total(runs))


def _copy(ready: Ready[Drain], runs: Extents) -> int:
    return ready.target.space.ram.copy_to(runs, ready.pages.buffer, ready.pages.zero)
