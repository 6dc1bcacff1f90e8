"""Parts of the pool for areas of a tree that still runs.

Before there are images, the pages of a running tree can be copied to the pool. Each area that may
use the pool later gets a part of it, its seat. When the images are there, `layout` lets those parts
of areas that have a seat use the pool, at their seats, and nothing else.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from ovr.plan.pool.units import TABLE_SPAN, UNIT

__all__ = ["NO_SEATS", "RunningAreas", "Seat", "Seats", "assign_seats", "family_order"]


class Seat(NamedTuple):
    """The part of the pool for an area.

    Attributes:
        low: first GVA of the area, rounded down to whole units.
        high: the GVA after it, rounded up.
        at: the offset of `low` in the pool, in bytes.
    """

    low: int
    high: int
    at: int


@dataclass(frozen=True)
class Seats:
    """The seats of a tree.

    Attributes:
        of: the seats of each task by its pid in the pid namespace of the tree, ascending; in the
            order of their parts of the pool.
        size: size of the pool, in bytes.
        place: the best offset of its address modulo `TABLE_SPAN`.
    """

    of: Mapping[int, Sequence[Seat]]
    size: int
    place: int


NO_SEATS: Final = Seats({}, 0, 0)
"""Those of a tree that uses no pool."""


class RunningAreas(NamedTuple):
    """The areas of a running task that may use the pool.

    Attributes:
        pid: its pid in the pid namespace of the tree.
        ppid: likewise its parent's.
        areas: first GVA and GVA after the last, ascending.
    """

    pid: int
    ppid: int
    areas: Sequence[tuple[int, int]]


def assign_seats(tasks: Sequence[RunningAreas]) -> Seats:
    """Assign a part of the pool to each area.

    Args:
        tasks: the tasks of a tree, the root first.
    """
    by_pid = {task.pid: task for task in tasks}
    of: dict[int, list[Seat]] = {}
    at = 0
    # A hostile guest may have two tasks with the same pid.
    for pid in dict.fromkeys(family_order((task.pid, task.ppid) for task in tasks)):
        for low, high in _units(by_pid[pid].areas):
            of.setdefault(pid, []).append(Seat(low, high, at))
            at += high - low
    largest = max((seat for each in of.values() for seat in each), key=_size, default=None)
    place = 0
    if largest and len(of) == 1 and _size(largest) >= TABLE_SPAN:
        place = (largest.low - largest.at) % TABLE_SPAN
    return Seats(of, at, place)


def family_order(tasks: Iterable[tuple[int, int]]) -> list[int]:
    """Return the pids of a tree so that a task and its descendants follow one another.

    Args:
        tasks: pid and parent's pid, the root first.
    """
    children: dict[int, list[int]] = {}
    left: list[int] = []
    for pid, ppid in tasks:
        if left:
            children.setdefault(ppid, []).append(pid)
        else:
            left.append(pid)
    order: list[int] = []
    while left:
        order.append(left.pop())
        left += sorted(children.pop(order[-1], ()))
    return order


def _units(areas: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    # Neighbours may share a unit, of which each has only a part: none of them can use it.
    end = 0
    for first, last in areas:
        low, high = max(first // UNIT * UNIT, end), -(-last // UNIT) * UNIT
        if low < high:
            yield low, high
            end = high


def _size(seat: Seat) -> int:
    return seat.high - seat.low
