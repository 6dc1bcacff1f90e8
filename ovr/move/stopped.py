"""The stopped tree in the source: its images without memory, and the location of its memory."""

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from ovr._fastcopy import PIECE, punch_hole
from ovr.attempt.attempt import Attempt
from ovr.attempt.origin import Origin
from ovr.attempt.targets import Target
from ovr.dump.copies import Copies
from ovr.dump.memory import Dumped, dumped_pages, place
from ovr.dump.output import NewImages, writable
from ovr.dump.received import Received
from ovr.dump.rseq import rseq_pages
from ovr.dump.stop import save_inside
from ovr.dump.targets import targets_of
from ovr.errors import ImagesDamaged
from ovr.images import ImageSet, Memory, Task
from ovr.images.cow import ImageContents
from ovr.images.shared import shared_memory
from ovr.images.vma import Vmas
from ovr.memory.extents import (
    Extents,
    addresses_of,
    as_pieces,
    cut_to,
    file_ranges,
    on_same_frames,
    split,
    total,
)
from ovr.memory.ranges import Ranges, common, join, no_ranges, ranges_of
from ovr.plan import Plan, Warm
from ovr.plan.pages import Reason
from ovr.restore.skeleton import Built, check_inside_size
from ovr.vm.hold import unbroken

__all__ = ["Stopped", "look_at_stopped", "pages_there"]

_WALKED_AT_ONCE: Final = 4 << 30
"""Most bytes of pages that are looked up in one hold."""
_SAVED_AT_ONCE: Final = 64 << 20
"""Most bytes of pages that are in the host's memory to be compared."""
_MOST_OF_RAM: Final = 16
"""Most memory of a task or object, as a multiple of the guest's RAM: the rest is in swap."""


@dataclass(frozen=True)
class Stopped:
    """A tree that CRIU holds in the source.

    A `ovr.images.cow.Contents`: pages of parent and child are equal if they are the same frame.

    Attributes:
        attempt: holds it.
        unchanged: addresses of pages that were copied before and have not changed since, by pid in
            the pid namespace of the tree.
    """

    attempt: Attempt
    unchanged: Mapping[int, Ranges]
    _place: Path
    _targets: Mapping[str, Target]
    _origins: Mapping[str, Origin]

    def content(self, memory: Memory, level: int) -> Origin:
        """Return the pages of a memory of the images."""
        return self._origins[memory.name]

    def equal(self, own: Memory, theirs: Memory, areas: Vmas) -> Ranges:
        """Return the pages in some areas that two memories share, neighbours joined."""
        both = common(addresses_of(own.entries), addresses_of(theirs.entries))
        both = common(both, ranges_of(areas["start"], areas["end"]))
        if not len(both) or not {own.name, theirs.name} <= self._targets.keys():
            return no_ranges()
        one, other = self._targets[own.name], self._targets[theirs.name]
        found = []
        for part in split(_pieces_of(both), _WALKED_AT_ONCE):

            def same_frames(part: Extents = part) -> Extents:
                one.check()
                other.check()
                return on_same_frames(one.space.walk(part), other.space.walk(part))

            found.append(addresses_of(unbroken(self.attempt.holder, same_frames)))
        return join(*found)

    def zeros(self, task: Task, ranges: Ranges) -> Ranges:
        """Return the pages of a task in `ranges` that are filled with zeros."""
        assert task.memory is not None
        found = []
        # A little at a time, and given back: there may be more than the host has memory for.
        for part in split(
            cut_to(task.memory.entries, ranges["start"], ranges["end"]), _SAVED_AT_ONCE
        ):
            self._save(task.memory, part)
            found.append(ImageContents().zeros(task, addresses_of(part)))
            self._give_back(task.memory, part)
        return join(*found)

    def save_inside(self, plan: Plan) -> None:
        """Write the pages that stay inside to the images.

        Raises:
            AttemptFailed: some pages are not there, and stay away.
            GuestFault: page tables of the guest are damaged.
            ImagesUnsupported: they are more than the destination's agent takes.
            UsageError: they cannot be written.
        """
        inside = [
            (memory.memory, memory.runs[memory.runs["reason"] > Reason.INHERITED])
            for memory in plan.memories
        ]
        # Before they are written: they go to the host's memory.
        check_inside_size(sum(total(runs) for _, runs in inside))
        for memory, runs in inside:
            self._save(memory, runs)

    def _save(self, memory: Memory, runs: Extents) -> None:
        # Images written by CRIU itself are complete, and have no target.
        if len(runs) and memory.name in self._targets:
            target = replace(self._targets[memory.name], pieces=as_pieces(runs))
            with writable(self._place / memory.pages_name):
                self.attempt.saver(lambda count: None).save([target])

    def _give_back(self, memory: Memory, runs: Extents) -> None:
        if memory.name in self._targets:
            path = self._place / memory.pages_name
            with writable(path), path.open("r+b") as file:
                for start, end in file_ranges(runs):
                    punch_hole(file.fileno(), start, end - start)


def look_at_stopped(
    attempt: Attempt, received: Received, images: NewImages, copies: Copies, stack: ExitStack
) -> Stopped:
    """Write the final pagemaps, with empty pages images, and find the pages in the guest.

    Args:
        attempt: holds the tree.
        received: the images of the guest's CRIU.
        images: gets pagemaps and pages images.
        copies: the pages that were copied while the tree ran.
        stack: closes the pages images.

    Raises:
        ImagesDamaged, ImagesUnsupported: CRIU's images are invalid, or have more memory than the
            guest can have.
        AttemptFailed: a task is not there.
        GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
        UsageError: the images cannot be written.
    """
    placed = []
    unchanged = {}
    late = rseq_pages(received.names, images)
    for dumped in dumped_pages(received.names, images):
        _check_size(dumped, attempt.vm.ram.size)
        if not dumped.shared:
            of_task = late.get(dumped.number, no_ranges())
            unchanged[dumped.number] = copies.check_unchanged(
                dumped, of_task, attempt.tree(), attempt.holder
            )
        placed.append(
            place(dumped, images, lambda one, size: images.sink(one.pages_name, size), no_ranges())
        )
        stack.enter_context(placed[-1].sink)
    with closing(ImageSet.open(images.path)) as saved:
        objects = {one.shmid: one for one in shared_memory(saved)}
    outside, _ = save_inside(attempt.agent, placed, objects, images)
    targets = {
        one.dumped.name: target
        for one in outside
        for target in targets_of([one], objects, attempt.tree(), attempt.agent)
    }
    origins = {name: _origin(target) for name, target in targets.items()}
    return Stopped(attempt, unchanged, images.path, targets, origins)


def _check_size(dumped: Dumped, ram: int) -> None:
    size = total(dumped.pagemap.entries)
    if size > _MOST_OF_RAM * ram:
        raise ImagesDamaged(
            f"{dumped.name}: {size >> 20} MiB of pages, in a guest with {ram >> 20} MiB of RAM",
            "is the agent of the source the guest's own, and unchanged?",
        )


def _pieces_of(ranges: Ranges) -> Extents:
    found = np.zeros(len(ranges), PIECE)
    found["gva"], found["size"] = ranges["start"], ranges["end"] - ranges["start"]
    return found


def _origin(target: Target) -> Origin:
    return Origin(
        name=f"{target.name} of the source", space=target.space, places=target.pieces,
        check=target.check, ask=target.ask,
    )  # fmt: skip


def pages_there(plan: Plan, built: Built, stopped: Stopped) -> Mapping[Origin, Ranges]:
    """Return the pages that came with the pool and have not changed, by their origin.

    Args:
        plan: the plan.
        built: the skeleton.
        stopped: the tree in the source.
    """
    if not (isinstance(built.memory, Warm) and built.complete):
        return {}
    return {
        stopped.content(task.memory, 0): common(kept, unchanged)
        for task in plan.tasks
        if len(kept := built.memory.kept.get(task.task.pid, no_ranges()))
        and len(unchanged := stopped.unchanged.get(task.task.pid, no_ranges()))
    }
