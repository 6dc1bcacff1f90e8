"""Checks of a plan against the guest, before anything is built there."""

from ovr.errors import PidTaken
from ovr.images import ImageSet
from ovr.kernel import Kernel, find_task

__all__ = ["refuse_taken_pids"]


def refuse_taken_pids(images: ImageSet, kernel: Kernel) -> None:
    """Refuse a tree some of whose pids are in use in the guest.

    CRIU would fail too, but after it has built half of the tree. A tree whose root is pid 1 has a
    pid namespace of its own, where no pid is in use.

    Raises:
        PidTaken: one is.
    """
    if images.tasks[0].pid == 1:
        return
    for tid in (tid for task in images.tasks for tid in task.threads):
        if taken := find_task(kernel, tid):
            raise PidTaken(
                f"pid {tid} is taken in the guest by {taken.comm!r}",
                "end that process and restore again; images can only come back with their pids",
            )
