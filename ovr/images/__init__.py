"""Read and write CRIU's image formats. Independent of any guest.

`ImageSet` reads a directory that ``criu dump -D`` wrote; `InsideImages` derives another set from
it. The messages are in `messages` and `objects`, VMA flags in `vma`, pagemaps in `pagemap`.
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
