"""The kernel's arrays of pointers: ``struct xarray``, and ``struct idr`` on top of it.

Source: include/linux/xarray.h, lib/xarray.c, include/linux/idr.h, lib/radix-tree.c.
"""

from typing import Final

from ovr.errors import GuestFault
from ovr.kernel.types.view import Struct
from ovr.memory.addresses import Gva

__all__ = ["idr_find", "is_internal", "is_node", "xa_load"]

INTERNAL: Final = 2
MAX_INTERNAL: Final = 4096
"""Internal entries up to here are numbers (siblings, reserved); above they are nodes."""


def is_internal(entry: int) -> bool:
    """Tell whether an entry is internal to the array (``xa_is_internal()``)."""
    return entry & 3 == INTERNAL


def is_node(entry: int) -> bool:
    """Tell whether an entry points to a node (``xa_is_node()``)."""
    return is_internal(entry) and entry > MAX_INTERNAL


def xa_load(array: Struct, index: int) -> Gva:
    """Return the entry at `index` of a ``struct xarray``; 0 if there is none.

    Raises:
        GuestFault: the nodes are invalid.
    """
    entry = array.xa_head.address_
    if not is_node(entry):
        return Gva(0 if index or is_internal(entry) else entry)
    above = 64
    while is_node(entry):
        node = array.types_.pointer("struct xa_node", array.space_, Gva(entry - INTERNAL))
        slots, shift = node.slots, node.shift
        if shift >= above:
            raise GuestFault(f"an xarray loops at {node.address_:#x}", node.address_)
        offset = index >> shift
        if above < 64:  # only the top node may be too small for the index
            offset &= len(slots) - 1
        elif offset >= len(slots):
            return Gva(0)
        entry = slots[offset].address_
        if is_internal(entry) and entry >> 2 < len(slots):  # a sibling: the entry is in that slot
            entry = slots[entry >> 2].address_
        above = shift
    return Gva(0 if is_internal(entry) else entry)


def idr_find(idr: Struct, number: int) -> Gva:
    """Return the pointer that a ``struct idr`` holds for `number`; 0 if none (``idr_find()``)."""
    index = number - idr.idr_base
    return xa_load(idr.idr_rt, index) if index >= 0 else Gva(0)
