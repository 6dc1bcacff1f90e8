"""The stopped tree: which pages are still to be read."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from ovr.attempt.attempt import Attempt
from ovr.dump.ahead import Ahead
from ovr.dump.memory import Placed, dumped_pages, place
from ovr.dump.output import NewImages
from ovr.dump.received import Fetched, Received
from ovr.dump.rseq import rseq_pages
from ovr.dump.targets import reachable
from ovr.guest.client.agent import Agent
from ovr.images.shared import SharedMemory
from ovr.memory.ranges import no_ranges

__all__ = ["place_pages", "save_inside"]


def place_pages(
    attempt: Attempt, received: Received, images: NewImages, ahead: Ahead, stack: ExitStack
) -> list[Placed]:
    """Write the final pagemaps, and make room for the pages that are still to be read.

    Args:
        attempt: holds the tree.
        received: the images of the guest's CRIU.
        images: gets pagemaps and pages images.
        ahead: what was done before.
        stack: closes the pages images.

    Raises:
        ImagesDamaged, ImagesUnsupported: CRIU's pagemaps are invalid.
        AttemptFailed: a task is not there.
        UsageError: the files cannot be written.
    """
    placed = []
    copies = ahead.pre_copy.copies if ahead.pre_copy else None
    late = rseq_pages(received.names, images) if copies else {}
    for dumped in dumped_pages(received.names, images):
        copied = no_ranges()
        if copies:
            of_task = late.get(dumped.number, no_ranges())
            copied = copies.check_unchanged(dumped, of_task, attempt.tree(), attempt.holder)
        placed.append(place(dumped, images, ahead.room.sink, copied))
        stack.enter_context(placed[-1].sink)
    ahead.room.close()
    return placed


def save_inside(
    agent: Agent,
    placed: Sequence[Placed],
    objects: Mapping[int, SharedMemory],
    images: NewImages,
) -> tuple[list[Placed], list[Placed]]:
    """Get the pages images that cannot be read outside; return the others, and these.

    Raises:
        AttemptFailed: CRIU has not written them.
        UsageError: the files cannot be written.
        AgentUnreachable: the link broke.
    """
    outside, inside = [], []
    for one in placed:
        if one.dumped.shared and not reachable(objects.get(one.dumped.number)):
            fetch = Fetched(one.sink)
            agent.fetch(one.dumped.pages_name, fetch.save)
            fetch.check_complete()
            inside.append(one)
        else:
            outside.append(one)
    return outside, inside
