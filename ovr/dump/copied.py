"""Images of the pages that were copied while the tree ran.

Each round makes an image set that builds on the one before, as pre-dumps of CRIU do.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np

from ovr._fastcopy import RUN
from ovr.attempt.attempt import Attempt
from ovr.attempt.targets import Target
from ovr.dump.copies import Copies
from ovr.dump.output import INVENTORY, NewImages, Staging, writable
from ovr.dump.running import RunningTask
from ovr.dump.targets import reader
from ovr.dump.verify import written
from ovr.guest.client.agent import Agent
from ovr.images.framing import encode, image_bytes
from ovr.images.messages import InventoryEntry
from ovr.images.pagemap import PAGEMAP_DTYPE, PE_PARENT, PE_PRESENT, Pagemap, encode_pagemap
from ovr.memory.extents import Extents, as_pieces, ends_of, joined, total
from ovr.memory.ranges import Ranges

__all__ = ["CopiedImages"]

_PRE_DUMP: Final = 0
"""Image version of a pre-dump, which no tree can be restored from (criu/cr-dump.c)."""


class CopiedImages:
    """A `ovr.dump.precopy.Store` of image sets.

    In the runs that it returns, ``offset`` is the position in a pages image, and ``flags`` its
    number.

    Args:
        attempt: the attempt.
        output: gets the images.
    """

    def __init__(self, attempt: Attempt, output: Staging) -> None:
        self._output = output
        self._saver = attempt.saver(lambda count: None)
        self._files: list[Path] = []

    def begin_round(self) -> None:
        """Make an image set.

        Raises:
            UsageError: it cannot be written.
        """
        self._images = self._output.next_parent()

    def save(self, task: RunningTask, number: int, pages: Extents, before: Ranges) -> Extents:
        """Copy pages to a new image.

        Raises:
            TaskDied: the task has died.
            UsageError: the image cannot be written.
            GuestFault: page tables of the guest are damaged.
        """
        pages["offset"] = np.cumsum(pages["size"]) - pages["size"]
        images = self._images
        _write_pagemap(images, task, number, pages, before)
        name = f"pages-{number}.img"
        copied = [np.empty(0, RUN)]
        with images.sink(name, total(pages)) as sink, writable(images.path):
            target = Target(
                name=f"pid {task.pid}", space=task.space, frames=task.frames,
                pieces=as_pieces(pages), source=sink, ask=lambda _: None, check=task.check,
            )  # fmt: skip
            self._saver.save_own(target, lambda _, runs: copied.append(runs))
            sink.make_holes()
        runs = np.concatenate(copied)
        # Offsets in the image, not in a buffer.
        at = np.searchsorted(ends_of(pages), runs["gva"], side="right")
        runs["offset"] = pages["offset"][at] + (runs["gva"] - pages["gva"][at]).astype("<i8")
        runs["flags"] = len(self._files)
        self._files.append(images.path / name)
        return runs

    def end_round(self) -> None:
        """Make the images those of a pre-dump.

        Raises:
            UsageError: they cannot be written.
        """
        inventory = InventoryEntry(img_version=_PRE_DUMP)
        self._images.write(INVENTORY, image_bytes(INVENTORY, [encode(inventory)]))

    def targets(self, copies: Copies, agent: Agent, stack: ExitStack) -> Iterator[Target]:
        """Yield the pages that have not changed, with their images as the sources.

        Args:
            copies: the pages, checked.
            agent: asked for pages that are not in memory any more.
            stack: closes the images.
        """
        for task, runs in copies.unchanged():
            for file in np.unique(runs["flags"]).tolist():
                yield Target(
                    name=f"pid {task.pid}", space=task.space, frames=None,
                    pieces=as_pieces(runs[runs["flags"] == file]),
                    source=written(self._files[file], stack),
                    ask=reader(agent, task.tgid), check=task.check,
                )  # fmt: skip


def _write_pagemap(
    images: NewImages, task: RunningTask, number: int, pages: Extents, before: Ranges
) -> None:
    # Pages that are not there any more are listed as well: no pagemap refers to them.
    entries = np.zeros(len(pages) + len(before), PAGEMAP_DTYPE)
    entries["gva"] = np.concatenate([pages["gva"], before["start"]])
    entries["size"] = np.concatenate([pages["size"], before["end"] - before["start"]])
    entries["flags"] = PE_PARENT
    entries["flags"][: len(pages)] = PE_PRESENT
    entries = entries[np.argsort(entries["gva"], kind="stable")]
    name = f"pagemap-{task.pid}.img"
    images.write(name, encode_pagemap(Pagemap(number, joined(entries), compat=True), name))
