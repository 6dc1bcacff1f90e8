"""The skeleton: the stopped tree without its memory, built by the guest's CRIU."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ovr.attempt.attempt import Attempt
from ovr.checkpoint import Checkpoint
from ovr.errors import CriuFailed, ImagesUnsupported, OvrError
from ovr.guest.client.results import HeldTree
from ovr.guest.client.session import AgentInfo
from ovr.guest.protocol import MAX_IMAGE_BYTES
from ovr.images import image_size
from ovr.images.regular import regular_file
from ovr.plan import NO_POOL, Cold, Inside, Plan, Pool, Warm, build_inside
from ovr.plan.pool.seats import Seats
from ovr.plan.pool.table import foreign_cgroup

__all__ = ["Built", "build_skeleton", "check_inside_size", "inside_of"]

log = logging.getLogger("ovr.restore")


@dataclass(frozen=True)
class Built:
    """The skeleton that stands.

    Attributes:
        root_pid: pid of its root task, in the guest's initial pid namespace.
        memory: where its memory came from.
        complete: whether all memory that was to come from the pool did.
        unread_config: CRIU's configuration files in the guest that were not read, by path.
    """

    root_pid: int
    memory: Warm | Cold
    complete: bool
    unread_config: Mapping[str, str]


def inside_of(
    plan: Plan, checkpoint: Checkpoint, guest: AgentInfo, seats: Seats | None = None
) -> Inside:
    """Build the inside image set for a guest, with its pool where that can be used.

    Args:
        plan: the plan.
        checkpoint: what is restored.
        guest: the guest, with its pool.
        seats: the parts of the pool that have pages of the tree already.

    Raises:
        ImagesUnsupported: it is larger than the agent takes.
    """
    inside = build_inside(plan, _pool(plan, checkpoint, guest, seats))
    check_inside_size(sum(map(image_size, inside.images.values())))
    return inside


def check_inside_size(size: int) -> None:
    """Check that the agent takes so many bytes of images.

    Raises:
        ImagesUnsupported: it does not.
    """
    if size > MAX_IMAGE_BYTES:
        raise ImagesUnsupported(
            f"{size} bytes of images would go to the guest's CRIU, which gets at most"
            f" {MAX_IMAGE_BYTES}",
            "restore more from outside (--outside all); `ovr plan` says what stays inside, and why",
        )


def _pool(plan: Plan, checkpoint: Checkpoint, guest: AgentInfo, seats: Seats | None) -> Pool | Cold:
    if checkpoint.engine is not None:
        return Cold(f"{checkpoint.engine} starts a CRIU of its own")
    if not guest.warm:
        return NO_POOL
    if foreign_cgroup(plan.images, checkpoint.options):
        return Cold(
            "the tasks belong into a cgroup of their own, and the pool is charged to the agent's"
        )
    return Pool(guest.warm, guest.criu or "", guest.warm_at, seats)


def build_skeleton(
    attempt: Attempt,
    checkpoint: Checkpoint,
    inside: Inside,
    *,
    timeout: float | None,
    log_level: int,
    move: str | None = None,
) -> Built:
    """Have the guest build the skeleton, up to CRIU's pre-resume hook.

    Args:
        attempt: holds it from then on.
        checkpoint: what is restored.
        inside: its inside image set.
        timeout: seconds that CRIU or an engine may take; None: as long as it makes progress.
        log_level: CRIU's ``-v``.
        move: the id of the move that ends here.

    Raises:
        OvrError: as `Agent.begin`.
    """
    unread = {} if checkpoint.engine is not None else attempt.agent.criu_config()
    with _explained(checkpoint, unread):
        skeleton = attempt.begin(
            lambda agent: agent.begin(
                checkpoint.files(inside.images),
                criu_options=checkpoint.options,
                engine=checkpoint.engine,
                volumes=checkpoint.volumes,
                warm_images=inside.memory.images if isinstance(inside.memory, Warm) else (),
                timeout=timeout,
                log_level=log_level,
                move=move,
            ),
            engine=checkpoint.engine is not None,
        )
    log.info("skeleton stands: pid %d, %d threads", skeleton.root_pid, len(skeleton.tasks))
    memory = _memory_of(inside.memory, skeleton)
    complete = isinstance(memory, Warm) and skeleton.warm == memory.size and not skeleton.note
    return Built(skeleton.root_pid, memory, complete, unread)


def _memory_of(planned: Warm | Cold, skeleton: HeldTree) -> Warm | Cold:
    memory = planned
    if isinstance(planned, Warm) and not skeleton.warm:
        memory = Cold(skeleton.note or "the guest did not use the pool")
    if isinstance(memory, Cold):
        log.info("cold skeleton: %s", memory.why)
    elif skeleton.warm != memory.size or skeleton.note:
        log.warning(
            "only %d of %d MiB came from the pool: %s",
            skeleton.warm >> 20, memory.size >> 20, skeleton.note,
        )  # fmt: skip
    return memory


@contextmanager
def _explained(checkpoint: Checkpoint, unread: Mapping[str, str]) -> Iterator[None]:
    # CRIU names a file that is missing; the images have more about it. And CRIU may lack an option
    # of its configuration files, which only the CRIU of an engine reads.
    try:
        yield
    except CriuFailed as error:
        error.unread_config = unread
        with suppress(OvrError):  # nothing about the images is worse than what has happened
            if error.file and (was := regular_file(checkpoint.images, error.file)):
                error.hint += f"; {was}"
        raise
