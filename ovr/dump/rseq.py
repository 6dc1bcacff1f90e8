"""Pages that the kernel writes to after CRIU has looked for changed ones."""

from collections.abc import Collection, Iterator, Mapping
from typing import Final, TypeVar

import numpy as np
from google.protobuf.message import Message

from ovr.dump.output import NewImages
from ovr.images.framing import decode, frames
from ovr.images.messages import CoreEntry, PstreeEntry
from ovr.images.task import rseq_areas
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.ranges import Ranges, join, ranges_of

__all__ = ["rseq_pages"]

M = TypeVar("M", bound=Message)

_MAX_IMAGE: Final = 64 << 20
_PAGE: Final = ~np.uint64(PAGE_SIZE - 1)


def rseq_pages(names: Collection[str], images: NewImages) -> Mapping[int, Ranges]:
    """Return the pages with a registered ``struct rseq``, by pid in the pid namespace of the tree.

    CRIU looks for changed pages before it runs code in a task's threads (``dump_task_threads`` in
    criu/cr-dump.c), upon which the kernel writes the number of the CPU there.

    Args:
        names: names of the images that CRIU has written.
        images: has them.

    Raises:
        ImagesDamaged: they are invalid.
    """
    found = {}
    for task in _entries("pstree.img", PstreeEntry, images):
        # Thread ids of dead tasks are garbage.
        cores = {f"core-{tid}.img" for tid in (task.pid, *task.threads)}.intersection(names)
        areas = rseq_areas(core for name in cores for core in _entries(name, CoreEntry, images))
        starts, ends = areas["start"] & _PAGE, (areas["end"] + (PAGE_SIZE - 1)) & _PAGE
        found[task.pid] = join(ranges_of(starts, ends))
    return found


def _entries(name: str, kind: type[M], images: NewImages) -> Iterator[M]:
    for frame in frames(images.read(name, _MAX_IMAGE), name):
        yield decode(kind, frame.payload, name)
