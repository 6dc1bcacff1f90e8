"""CRIU's image formats, read and written. Knows no guest.

`ImageSet` reads a directory that ``criu dump -D`` wrote; `InsideImages` makes another set of it.
The messages are in `messages` and `objects`, what VMAs say in `vma`, pagemaps in `pagemap`.
"""

from ovr.images.draft import Draft
from ovr.images.imageset import ImageSet
from ovr.images.messages import CoreEntry, FsEntry, MmEntry, VmaEntry
from ovr.images.pagemap import PAGEMAP_DTYPE
from ovr.images.rewrite import InsideImages, Slices, image_chunks, image_size
from ovr.images.task import Memory, Task, TaskState
from ovr.images.wire import copy_of

__all__ = [
    "PAGEMAP_DTYPE",
    "CoreEntry",
    "Draft",
    "FsEntry",
    "ImageSet",
    "InsideImages",
    "Memory",
    "MmEntry",
    "Slices",
    "Task",
    "TaskState",
    "VmaEntry",
    "copy_of",
    "image_chunks",
    "image_size",
]
