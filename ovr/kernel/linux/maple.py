"""The kernel's maple tree: ranges of indexes, each with an entry; a process's VMAs among them.

Source: include/linux/maple_tree.h, lib/maple_tree.c.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from ovr.errors import GuestFault, KernelNotFound
from ovr.kernel.linux.xarray import is_internal, is_node
from ovr.kernel.types.live import Deadline
from ovr.kernel.types.view import Array, Struct
from ovr.memory.addresses import Gva

__all__ = ["Range", "mt_for_each"]

MAX_INDEX: Final = (1 << 64) - 1
MAX_NODES: Final = 1 << 17
MAX_DEPTH: Final = 31  # MAPLE_HEIGHT_MAX
MAX_PIVOTS: Final = 64  # twice the largest number in any kernel
NODE_MASK: Final = ~0xFF  # MAPLE_NODE_MASK: nodes are aligned, the low bits hold their type
TYPE_SHIFT: Final = 3  # MAPLE_NODE_TYPE_SHIFT
TYPE_MASK: Final = 0xF


class Range(NamedTuple):
    """Indexes `first` to `last`, both included, and the entry that they share."""

    first: int
    last: int
    entry: Gva


def mt_for_each(tree: Struct, first: int = 0, last: int = MAX_INDEX) -> Iterator[Range]:
    """Yield the occupied ranges of a ``struct maple_tree``, ascending.

    Args:
        tree: the tree.
        first: the first index to look at.
        last: the last one; nodes without an index between these are not read.

    Raises:
        GuestFault: the tree is invalid, or changed while it was read.
    """
    root = tree.ma_root.address_
    if is_node(root):
        yield from _Walk(tree, first, last).node(root, 0, MAX_INDEX, 0)
    elif root and not is_internal(root) and not first:
        yield Range(0, 0, Gva(root))


class _Walk:
    # One walk down a tree, its length bounded.

    def __init__(self, tree: Struct, first: int, last: int) -> None:
        self._tree = tree
        self._first, self._last = first, last
        self._budget = MAX_NODES
        self._deadline = Deadline("a maple tree")
        self._kinds = tree.types_.enum("enum maple_type")

    def node(self, entry: int, first: int, last: int, depth: int) -> Iterator[Range]:
        at = Gva(entry & NODE_MASK)
        self._deadline.check(at)
        self._budget -= 1
        if not self._budget or depth > MAX_DEPTH:
            raise GuestFault(f"a maple tree loops at {at:#x}", at)
        node = self._tree.types_.pointer("struct maple_node", self._tree.space_, at)
        pivots, slots, leaf = self._layout(node, entry >> TYPE_SHIFT & TYPE_MASK)
        ranges = list(_ranges(pivots, slots, first, last, at))
        if node.parent.address_ & NODE_MASK == at:  # ma_dead_node()
            raise GuestFault(f"maple tree node {at:#x} was freed while it was read", at)
        for low, high, below in ranges:
            if high < self._first or low > self._last:
                continue
            if not leaf:  # only the root is marked as a node
                yield from self.node(below, low, high, depth + 1)
            elif below and not is_internal(below):
                yield Range(low, high, below)

    def _layout(self, node: Struct, kind: int) -> tuple[list[int], Array, bool]:
        # A node's pivots (the last index of each slot but the last), its slots, and whether
        # these are entries.
        if kind == self._kinds["maple_arange_64"]:
            return _pivots(node.ma64.pivot), node.ma64.slot, False
        if kind in (self._kinds["maple_range_64"], self._kinds["maple_leaf_64"]):
            return _pivots(node.mr64.pivot), node.mr64.slot, kind == self._kinds["maple_leaf_64"]
        raise GuestFault(f"maple tree node {node.address_:#x} is of kind {kind}", node.address_)


def _pivots(pivots: Array) -> list[int]:
    if len(pivots) > MAX_PIVOTS:
        raise KernelNotFound(f"the guest kernel's maple tree nodes have {len(pivots)} pivots")
    return list(pivots)


def _ranges(pivots: list[int], slots: Array, first: int, last: int, at: int) -> Iterator[Range]:
    for number, pivot in enumerate([*pivots, last]):
        # mas_logical_pivot(): an empty pivot ends the node
        high = pivot if pivot or not number else last
        if not first <= high <= last:
            raise GuestFault(f"maple tree node {at:#x} is not in order", at)
        yield Range(first, high, slots[number].address_)
        if high == last:
            return
        first = high + 1
