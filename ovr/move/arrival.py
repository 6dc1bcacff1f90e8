"""The restore of a moved tree in the destination, up to its commit."""

from dataclasses import dataclass

from ovr.attempt import settings
from ovr.attempt.attempt import Attempt
from ovr.attempt.stopwatch import Stopwatch
from ovr.checkpoint import Checkpoint
from ovr.guest.client.results import PoolInfo
from ovr.move.pool import with_pool
from ovr.move.stopped import Stopped, pages_there
from ovr.plan import Plan, Warm, make_plan
from ovr.plan.pool.seats import Seats
from ovr.restore.allocation import allocate_outside
from ovr.restore.preflight import refuse_taken_pids
from ovr.restore.skeleton import Built, build_skeleton, inside_of

__all__ = ["Arrived", "arrive"]


@dataclass(frozen=True)
class Arrived:
    """A restored tree that is held.

    Attributes:
        plan: the plan.
        built: its skeleton.
        copied: bytes that were copied while it was stopped.
        compared: bytes that were compared with the source.
    """

    plan: Plan
    built: Built
    copied: int
    compared: int

    @property
    def root_pid(self) -> int:
        """Pid of the root task, in the initial pid namespace."""
        return self.built.root_pid


def arrive(
    attempt: Attempt,
    stopped: Stopped,
    checkpoint: Checkpoint,
    *,
    move: str,
    pool: PoolInfo | None,
    seats: Seats,
    verify: str,
    log_level: int,
    timeout: float | None,
    watch: Stopwatch,
) -> Arrived:
    """Restore a tree that is stopped in its source, and verify it.

    Args:
        attempt: of the destination; it holds the tree from then on.
        stopped: the tree in the source.
        checkpoint: its images, without the pages that go outside.
        move: the id of the move.
        pool: the destination's pool, with pages of the tree.
        seats: where they are in it.
        verify: compare none of the memory with the source, a ``sample``, or all (``full``).
        log_level: as for `ovr.move.story.move`.
        timeout: likewise.
        watch: measures the phases.

    Raises:
        OvrError: the cause.
    """
    kernel, agent = attempt.vm.kernel, attempt.agent
    with watch("plan"):
        refuse_taken_pids(checkpoint.images, kernel)
        guest = with_pool(agent.hello, pool)
        plan = make_plan(checkpoint.images, force_write=guest.force_write, contents=stopped)
        stopped.save_inside(plan)
        inside = inside_of(plan, checkpoint, guest, seats)
    with watch("skeleton"):
        built = build_skeleton(
            attempt, checkpoint, inside, timeout=timeout, log_level=log_level, move=move
        )
    with watch("populate"):
        warm = isinstance(built.memory, Warm)
        memory = allocate_outside(plan, attempt.tree(), agent, stopped.content, warm=warm)
        left = memory.without(pages_there(plan, built, stopped))
    copier = attempt.copier(watch.counter(left.bytes), origin=stopped.attempt.holder)
    with watch("memory"):
        copier.copy(left.families, left.targets)
    with watch("state"):
        settings.write(plan.settings, attempt.tree, attempt.holder, attempt.recording)
    with watch("verify"):
        settings.verify(plan.settings, attempt.tree())
        compared = copier.verify(memory.all, verify)
    return Arrived(plan, built, left.bytes, compared)
