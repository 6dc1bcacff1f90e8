"""The kernel's linked lists: ``struct list_head``.

A running guest changes its lists while we read them: every walk ends, with `GuestFault` if the
list does not lead back to its head or the walk takes too long.

Source: include/linux/list.h, include/linux/rculist.h.
"""

from collections.abc import Iterator
from typing import Any, Final

from ovr.errors import GuestFault
from ovr.kernel.types.live import Deadline
from ovr.kernel.types.view import Struct, container_of

__all__ = ["list_for_each_entry"]

MAX_ENTRIES: Final = 1 << 22
"""No list that we walk is longer: it is also the largest number of tasks (PID_MAX_LIMIT)."""


def list_for_each_entry(type_name: str, head: Struct, member: str) -> Iterator[Any]:
    """Yield the entries of a list.

    Args:
        type_name: the type of the entries: ``"struct task_struct"``.
        head: ``struct list_head``.
        member: the ``struct list_head`` in each entry.

    Raises:
        GuestFault: the list does not lead back to `head`.
    """
    for node in _nodes(head):
        yield container_of(node, type_name, member)


def _nodes(head: Struct) -> Iterator[Struct]:
    node = head.next
    seen: set[int] = set()
    deadline = Deadline("a list")
    while node.address_ != head.address_:
        deadline.check(node.address_)
        if node.address_ in seen or len(seen) >= MAX_ENTRIES:
            raise GuestFault(f"a list has no end: at {node.address_:#x}", node.address_)
        seen.add(node.address_)
        yield node
        node = node.next
