"""The parent image set: it makes CRIU leave a tree's memory to the host.

``criu dump --track-mem --prev-images-dir`` takes each page whose soft-dirty bit is clear for one
that the parent dump has (``generate_iovs`` in criu/mem.c), and reads none of them. Our parent says
that it has every page of each task.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from ovr.images.framing import encode, image_bytes
from ovr.images.messages import InventoryEntry, PagemapEntry, PagemapHead
from ovr.images.pagemap import PE_PRESENT
from ovr.kernel import Kernel, tree_of
from ovr.memory.addresses import PAGE_SHIFT

__all__ = ["Parent", "parent_images"]

_USER_BITS: Final = {4: 47, 5: 56}
"""Bits of a user address, by levels of page tables."""
_ENTRY_BITS: Final = 42
"""Bits of the size of an entry: CRIU before 4.2 counts pages in 32 bits."""
_VERSION: Final = 2  # CRTOOLS_IMAGES_V1_1
_LATEST: Final = (1 << 64) - 1


class Parent:
    """The parent image set of a running tree.

    Args:
        kernel: the guest's kernel.
        root_pid: the root task, in the guest's initial pid namespace.
    """

    def __init__(self, kernel: Kernel, root_pid: int) -> None:
        self._kernel = kernel
        self._pid = root_pid
        self._known: set[str] = set()

    def new_images(self) -> Mapping[str, bytes]:
        """Return the images that were not returned before: all, then those of new tasks.

        Raises:
            GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
        """
        pids = [number for number, _ in tree_of(self._kernel, self._pid)]
        images = parent_images(pids, self._kernel.space.levels)
        new = {name: data for name, data in images.items() if name not in self._known}
        self._known |= new.keys()
        return new


def parent_images(pids: Sequence[int], levels: int) -> Mapping[str, bytes]:
    """Return the parent image set.

    A task without a pagemap there is dumped by CRIU with its memory.

    Args:
        pids: pids of the tasks, in the pid namespace of the tree.
        levels: levels of the guest's page tables.
    """
    # A process that was started after the parent dump would be another one with the same pid
    # (detect_pid_reuse in criu/mem.c).
    inventory = InventoryEntry(img_version=_VERSION, dump_uptime=_LATEST)
    images = {"inventory.img": image_bytes("inventory.img", [encode(inventory)])}
    pages = 1 << (_ENTRY_BITS - PAGE_SHIFT)
    entries = [
        # Each CRIU reads one of the two counts.
        encode(PagemapEntry(vaddr=gva, compat_nr_pages=pages, nr_pages=pages, flags=PE_PRESENT))
        for gva in range(0, 1 << _USER_BITS[levels], 1 << _ENTRY_BITS)
    ]
    for pid in pids:
        name = f"pagemap-{pid}.img"
        images[name] = image_bytes(name, [encode(PagemapHead(pages_id=pid)), *entries])
    return images
