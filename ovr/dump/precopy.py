"""Copy pages while the tree runs, so that few are left when it is stopped.

In the first round all pages are copied. In each further one, and once more right before CRIU stops
the tree, the agent freezes the tree for a moment: the host looks which pages have changed, and the
agent clears the soft-dirty bits. What has changed is copied in the next round, or at the stop.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple, Protocol

from ovr._fastcopy import OWNED, SOFT_DIRTY
from ovr.attempt.attempt import Attempt
from ovr.dump.copies import Copies
from ovr.dump.running import RunningTask, running_tasks
from ovr.errors import TaskDied
from ovr.memory.extents import Extents, total, with_flags
from ovr.memory.ranges import Ranges

__all__ = ["AS_MANY_AS_HELP", "PreCopy", "Round", "Store"]

log = logging.getLogger("ovr.dump")

AS_MANY_AS_HELP: Final = -1
"""Rounds as long as little changes in one, and more than is soon copied at the stop."""
_FEW_BYTES: Final = 8 << 20
"""What is copied at the stop in less time than a round takes."""


_Seen = tuple[RunningTask, Extents]


class Round(NamedTuple):
    """One round, or the last look, in which nothing is copied.

    Attributes:
        size: bytes copied.
        seconds: time it took.
        frozen: seconds for which the tree was frozen, as measured in the guest.
    """

    size: int
    seconds: float
    frozen: float


class Store(Protocol):
    """Where the copies go."""

    def begin_round(self) -> None:
        """Begin a round."""

    def save(self, task: RunningTask, number: int, pages: Extents, before: Ranges) -> Extents:
        """Copy pages of a running task; return the runs that were copied.

        Args:
            task: the task.
            number: its number in this round.
            pages: a `_fastcopy.RUN` array.
            before: addresses of its pages that were copied before, and have not changed.

        Raises:
            TaskDied: the task has died.
        """

    def end_round(self) -> None:
        """End a round."""


class PreCopy:
    """Copies of pages of a running tree, and the rounds in which they are made.

    Args:
        attempt: the attempt, with CRIU started.
        root_pid: the root task, in the guest's initial pid namespace.
        store: gets the pages.

    Attributes:
        copies: the pages.
        rounds: what was done.
        left: after `run` with `AS_MANY_AS_HELP`, bytes that have changed again, and how many of
            them are few.
    """

    def __init__(self, attempt: Attempt, root_pid: int, store: Store) -> None:
        self.copies = Copies()
        self.rounds: list[Round] = []
        self.left = (0, 0)
        self._attempt = attempt
        self._pid = root_pid
        self._store = store

    def run(self, rounds: int, budget: float = 0.0) -> None:
        """Copy pages.

        Args:
            rounds: the number of rounds, or `AS_MANY_AS_HELP`.
            budget: seconds that it may take to copy what has changed at the end; what takes as
                long as that is few enough.

        Raises:
            AttemptFailed: the tree cannot be frozen.
            UsageError: the images cannot be written.
            GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
            AgentUnreachable: the link broke.
        """
        started = time.perf_counter()
        agent = self._attempt.agent
        agent.track()
        self._copy(self._walk(self._list()), 0.0, started)
        while self._another_helps(budget) if rounds < 0 else len(self.rounds) < rounds:
            started = time.perf_counter()
            agent.freeze()
            self._copy(*self._look(), started)

    def let_stop(self) -> None:
        """Look for the last time which pages have changed, and let CRIU stop the tree.

        Without copies there is nothing to look for.

        Raises:
            CriuFailed: CRIU failed.
            AttemptFailed, GuestFault, KernelNotFound, AgentUnreachable: as `run`.
        """
        if not self.copies:
            self._attempt.agent.track(stop=True)
            return
        started = time.perf_counter()
        self._attempt.agent.freeze()
        _, frozen = self._look(stop=True)
        self.rounds.append(Round(0, time.perf_counter() - started, frozen))

    def _list(self) -> list[RunningTask]:
        return [*running_tasks(self._attempt.vm.kernel, self._pid)]

    def _walk(self, tasks: Sequence[RunningTask]) -> list[_Seen]:
        seen = []
        for task in tasks:
            with suppress(TaskDied):  # its pages are not needed any more
                seen.append((task, task.walk_marked(self._attempt.holder)))
        return seen

    def _look(self, *, stop: bool = False) -> tuple[list[_Seen], float]:
        # Of a frozen tree. What is not seen now is taken for changed: its bits are cleared, too.
        seen = self._walk(self._list())
        frozen = self._attempt.agent.track(stop=stop)
        self.copies.keep(seen)
        return seen, frozen

    def _another_helps(self, budget: float) -> bool:
        found = [pages for _, pages in self._walk(self._list())]
        changed = sum(total(with_flags(pages, OWNED | SOFT_DIRTY)) for pages in found)
        first = self.rounds[0]
        few = max(_FEW_BYTES, int(budget * first.size / first.seconds))
        self.left = changed, few
        return changed > few and 2 * changed < self.rounds[-1].size

    def _copy(self, seen: Sequence[_Seen], frozen: float, started: float) -> None:
        self._store.begin_round()
        size = 0
        for number, (task, found) in enumerate(seen, 1):
            pages = self.copies.without(task, with_flags(found, OWNED))
            with suppress(TaskDied):
                copied = self._store.save(task, number, pages, self.copies.addresses(task))
                self.copies.add(task, copied)
                size += total(copied)
        self._store.end_round()
        self.rounds.append(Round(size, time.perf_counter() - started, frozen))
        log.info(
            "round %d: %.1f MB copied in %.3f s, frozen %.3f s",
            len(self.rounds), size / 1e6, self.rounds[-1].seconds, frozen,
        )  # fmt: skip
