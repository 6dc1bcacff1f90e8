"""Pages to be copied, with their frames in the guest and the image that has or gets them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ovr.attempt.origin import Origin
from ovr.attempt.sink import Sink
from ovr.images.source import Source
from ovr.memory.extents import Extents
from ovr.memory.paging import AddressSpace, Frames
from ovr.memory.ranges import Ranges, no_ranges

__all__ = ["Family", "Part", "Target"]


@dataclass(frozen=True)
class Target:
    """Pages of one image and of one address space of the guest.

    Attributes:
        name: its name in messages.
        space: the address space in the guest.
        frames: tells which frames are the target's own; None where any will do.
        pieces: a `_fastcopy.PIECE` array; offsets are positions in `source`.
        source: a pages image to be copied from (`Source`) or to (`Sink`), or the memory in another
            VM to be copied from (`Origin`).
        ask: asks the guest to map pages, given as pieces, once more with their content.
        check: raises `AttemptFailed` if `space` is not that of its process any more; called in
            every hold before a page table is walked.
        spared: ranges of bytes that are not written.
    """

    name: str
    space: AddressSpace
    frames: Frames | None
    pieces: Extents
    source: Source | Sink | Origin
    ask: Callable[[Extents], None]
    check: Callable[[], None]
    spared: Ranges = field(default_factory=no_ranges)


Part = tuple[Target, Extents]
"""Some of the pieces of a target."""


@dataclass(frozen=True)
class Family:
    """Pages that tasks share copy-on-write, written once.

    Attributes:
        first: the first task that had them; its `frames` are those that only the tree can have.
        descendants: the tasks that inherited them, each with the pieces that it shares with
            `first`. A descendant on another frame gets a copy of the content.
        excluded: address spaces, with ranges of GVAs at which they must not have the pages.
    """

    first: Target
    descendants: Sequence[Target]
    excluded: Sequence[tuple[AddressSpace, Ranges]]
