"""Copy pages while the tree runs, so that few are left when it is stopped.

In the first round all pages are copied. In each further one, and once more right before CRIU stops
the tree, the agent freezes the tree for a moment: the host looks which pages have changed, and the
agent clears the soft-dirty bits. What has changed is copied in the next round, or at the stop.

Each round makes an image set that builds on the one before, as pre-dumps of CRIU do.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import numpy as np

from ovr._fastcopy import OWNED, RUN, SOFT_DIRTY
from ovr.attempt.attempt import Attempt
from ovr.attempt.saver import Saver
from ovr.attempt.targets import Target
from ovr.dump.copies import Copies
from ovr.dump.output import INVENTORY, NewImages, Staging, writable
from ovr.dump.running import RunningTask, running_tasks
from ovr.errors import TaskDied
from ovr.images.framing import encode, image_bytes
from ovr.images.messages import InventoryEntry
from ovr.images.pagemap import PAGEMAP_DTYPE, PE_PARENT, PE_PRESENT, Pagemap, encode_pagemap
from ovr.memory.extents import Extents, as_pieces, ends_of, joined, total, with_flags

__all__ = ["AS_MANY_AS_HELP", "PreCopy", "Round"]

log = logging.getLogger("ovr.dump")

AS_MANY_AS_HELP: Final = -1
"""Rounds as long as little changes in one, and more than is soon copied at the stop."""
_FEW_BYTES: Final = 8 << 20
"""What is copied at the stop in less time than a round takes."""
_PRE_DUMP: Final = 0
"""Image version of a pre-dump, which no tree can be restored from (criu/cr-dump.c)."""


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


class PreCopy:
    """Copies of pages of a running tree, and the rounds in which they are made.

    Args:
        attempt: the attempt, with CRIU started.
        root_pid: the root task, in the guest's initial pid namespace.
        output: gets the images.

    Attributes:
        copies: the pages.
        rounds: what was done.
    """

    def __init__(self, attempt: Attempt, root_pid: int, output: Staging) -> None:
        self.copies = Copies()
        self.rounds: list[Round] = []
        self._attempt = attempt
        self._pid = root_pid
        self._output = output

    def run(self, rounds: int) -> None:
        """Copy pages.

        Args:
            rounds: the number of rounds, or `AS_MANY_AS_HELP`.

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
        while self._another_helps() if rounds < 0 else len(self.rounds) < rounds:
            started = time.perf_counter()
            agent.freeze()
            self._copy(*self._look(), started)

    def let_stop(self) -> None:
        """Look for the last time which pages have changed, and let CRIU stop the tree.

        Raises:
            CriuFailed: CRIU failed.
            AttemptFailed, GuestFault, KernelNotFound, AgentUnreachable: as `run`.
        """
        started = time.perf_counter()
        self._attempt.agent.freeze()
        _, frozen = self._look(stop=True)
        self.rounds.append(Round(0, time.perf_counter() - started, frozen))

    def _list(self) -> list[RunningTask]:
        return [*running_tasks(self._attempt.vm.kernel, self._pid)]

    def _walk(self, tasks: Sequence[RunningTask]) -> list[_Seen]:
        seen = []
        for task in tasks:
            with suppress(TaskDied):  # nobody will ask for its pages
                seen.append((task, task.walk_marked(self._attempt.holder)))
        return seen

    def _look(self, *, stop: bool = False) -> tuple[list[_Seen], float]:
        # Of a frozen tree. What is not seen now is taken for changed: its bits are cleared, too.
        seen = self._walk(self._list())
        frozen = self._attempt.agent.track(stop=stop)
        self.copies.keep(seen)
        return seen, frozen

    def _another_helps(self) -> bool:
        found = [pages for _, pages in self._walk(self._list())]
        changed = sum(total(with_flags(pages, OWNED | SOFT_DIRTY)) for pages in found)
        return changed > _FEW_BYTES and 2 * changed < self.rounds[-1].size

    def _copy(self, seen: Sequence[_Seen], frozen: float, started: float) -> None:
        images = self._output.next_parent()
        saver = self._attempt.saver(lambda count: None)
        size = 0
        for number, (task, found) in enumerate(seen, 1):
            with suppress(TaskDied):
                size += self._copy_task(task, found, number, saver, images)
        inventory = InventoryEntry(img_version=_PRE_DUMP)
        images.write(INVENTORY, image_bytes(INVENTORY, [encode(inventory)]))
        self.rounds.append(Round(size, time.perf_counter() - started, frozen))
        log.info(
            "round %d: %.1f MB copied in %.3f s, frozen %.3f s",
            len(self.rounds), size / 1e6, self.rounds[-1].seconds, frozen,
        )  # fmt: skip

    def _copy_task(
        self, task: RunningTask, found: Extents, number: int, saver: Saver, images: NewImages
    ) -> int:
        pages = self.copies.without(task, with_flags(found, OWNED))
        pages["offset"] = np.cumsum(pages["size"]) - pages["size"]
        self._write_pagemap(images, task, number, pages)
        copied = [np.empty(0, RUN)]
        with images.sink(f"pages-{number}.img", total(pages)) as sink, writable(images.path):
            target = Target(
                name=f"pid {task.pid}", space=task.space, frames=task.frames,
                pieces=as_pieces(pages), source=sink, ask=lambda _: None, check=task.check,
            )  # fmt: skip
            saver.save_own(target, lambda _, runs: copied.append(runs))
            sink.make_holes()
        runs = np.concatenate(copied)
        # Offsets in the image, not in a buffer.
        at = np.searchsorted(ends_of(pages), runs["gva"], side="right")
        runs["offset"] = pages["offset"][at] + (runs["gva"] - pages["gva"][at]).astype("<i8")
        self.copies.add(task, images.path / f"pages-{number}.img", runs)
        return total(runs)

    def _write_pagemap(
        self, images: NewImages, task: RunningTask, number: int, pages: Extents
    ) -> None:
        # Pages that are not there any more are listed as well: no pagemap refers to them.
        before = self.copies.addresses(task)
        entries = np.zeros(len(pages) + len(before), PAGEMAP_DTYPE)
        entries["gva"] = np.concatenate([pages["gva"], before["start"]])
        entries["size"] = np.concatenate([pages["size"], before["end"] - before["start"]])
        entries["flags"] = PE_PARENT
        entries["flags"][: len(pages)] = PE_PRESENT
        entries = entries[np.argsort(entries["gva"], kind="stable")]
        name = f"pagemap-{task.pid}.img"
        final = Pagemap(number, joined(entries), compat=True)
        images.write(name, encode_pagemap(final, name))
