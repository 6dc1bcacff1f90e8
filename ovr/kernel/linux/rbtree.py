"""The kernel's red-black trees: ``struct rb_root``.

Source: include/linux/rbtree.h, lib/rbtree.c.
"""

from collections.abc import Iterator
from typing import Any, Final

from ovr.errors import GuestFault
from ovr.kernel.types.live import Deadline
from ovr.kernel.types.view import Struct, container_of
from ovr.memory.addresses import Gva

__all__ = ["rbtree_for_each_entry"]

MAX_DEPTH: Final = 128
"""A red-black tree of 2^64 nodes is not deeper."""

MAX_ENTRIES: Final = 1 << 22
"""No tree that we walk has more: it is also the largest number of tasks (PID_MAX_LIMIT)."""


def rbtree_for_each_entry(type_name: str, root: Struct, member: str) -> Iterator[Any]:
    """Yield the entries of a tree in its order.

    Args:
        type_name: the type of the entries.
        root: ``struct rb_root``.
        member: the ``struct rb_node`` in each entry.

    Raises:
        GuestFault: the nodes do not form a tree.
    """
    path: list[Struct] = []
    seen: set[Gva] = set()
    deadline = Deadline("a red-black tree")
    node = root.rb_node
    while path or node:
        while node:
            deadline.check(node.address_)
            known = node.address_ in seen or len(seen) >= MAX_ENTRIES
            if known or len(path) >= MAX_DEPTH:
                raise GuestFault(f"a red-black tree loops at {node.address_:#x}", node.address_)
            seen.add(node.address_)
            path.append(node)
            node = node.rb_left
        node = path.pop()
        yield container_of(node, type_name, member)
        node = node.rb_right
