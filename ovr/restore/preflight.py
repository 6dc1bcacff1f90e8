"""Checks of a plan against the guest, before anything is built there."""

from collections.abc import Mapping

from ovr.errors import ImagesUnsupported, PidTaken
from ovr.guest.protocol import MAX_IMAGE_BYTES
from ovr.images import Extents, image_size
from ovr.kernel import Kernel, find_task
from ovr.plan import Plan

__all__ = ["refuse_large_images", "refuse_taken_pids"]


def refuse_taken_pids(plan: Plan, kernel: Kernel) -> None:
    """Refuse a tree some of whose pids are in use in the guest.

    CRIU would fail too, but after it has built half of the tree. A tree whose root is pid 1 has a
    pid namespace of its own, where no pid is in use.

    Raises:
        PidTaken: one is.
    """
    tasks = plan.images.tasks
    if tasks[0].pid == 1:
        return
    for tid in (tid for task in tasks for tid in task.threads):
        if taken := find_task(kernel, tid):
            raise PidTaken(
                f"pid {tid} is taken in the guest by {taken.comm!r}",
                "end that process and restore again; images can only come back with their pids",
            )


def refuse_large_images(images: Mapping[str, bytes | Extents]) -> None:
    """Refuse an inside image set that is larger than the agent takes.

    Raises:
        ImagesUnsupported: it is.
    """
    size = sum(map(image_size, images.values()))
    if size > MAX_IMAGE_BYTES:
        raise ImagesUnsupported(
            f"{size} bytes of images would go to the guest's CRIU, which gets at most"
            f" {MAX_IMAGE_BYTES}",
            "restore more from outside (--outside all); `ovr plan` says what stays inside, and why",
        )
