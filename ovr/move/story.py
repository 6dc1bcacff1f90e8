"""One move, step by step: docs/architecture.md, section 1, as code."""

import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from ovr.attempt.attempt import Attempt
from ovr.attempt.copier import VERIFY_MODES
from ovr.attempt.stopwatch import Stopwatch
from ovr.checkpoint import ImagesCheckpoint
from ovr.dump.container import Container, Running
from ovr.dump.output import DESCRIPTORS, NewImages
from ovr.dump.parent import Parent
from ovr.dump.plan import tree_to_dump
from ovr.dump.precopy import AS_MANY_AS_HELP, PreCopy
from ovr.dump.received import Received
from ovr.errors import AttemptFailed, UsageError
from ovr.guest.client.agent import Agent
from ovr.guest.client.failures import criu_lacked
from ovr.guest.protocol import MAX_IMAGE_BYTES
from ovr.kernel import Kernel
from ovr.move.arrival import arrive
from ovr.move.commit import Commit
from ovr.move.container import checkpoint_options, moved_container
from ovr.move.pool import PoolStore, make_pool, seats_of
from ovr.move.preflight import check_move
from ovr.move.report import MoveReport, make_report
from ovr.move.scratch import scratch_directory
from ovr.move.stopped import look_at_stopped
from ovr.plan.pool.seats import NO_SEATS
from ovr.restore.release import let_run
from ovr.vm.attach import AttachedVm

__all__ = ["DOWNTIME", "move"]

log = logging.getLogger("ovr.move")

DOWNTIME: Final = 0.3
"""Default for the time in which the last changes are copied, in seconds."""


def move(
    source: AttachedVm,
    destination: AttachedVm,
    tree: int | Container,
    *,
    source_agent: str | None = None,
    destination_agent: str | None = None,
    rounds: int = AS_MANY_AS_HELP,
    downtime: float = DOWNTIME,
    strict: bool = False,
    verify: str = "sample",
    check_cpu: bool = True,
    criu_options: Sequence[str] = (),
    log_level: int = 2,
    timeout: float | None = None,
    watch: Stopwatch | None = None,
) -> MoveReport:
    """Move a running tree from one VM of this host to another.

    Args:
        source: the VM that has it, attached writable.
        destination: the VM that gets it, likewise.
        tree: the root task, in the source's initial pid namespace; or a container of podman's.
        source_agent: address of the source's agent; None: as the VM's devices show.
        destination_agent: likewise.
        rounds: copy pages while the tree runs, in so many rounds, at least one, or
            `AS_MANY_AS_HELP`.
        downtime: with the latter: seconds for the copy of the remaining pages, with the tree
            stopped; rounds end earlier if they stop helping.
        strict: let the tree stay where it is if more is left.
        verify: read back none of the memory, a ``sample``, or all (``full``).
        check_cpu: refuse a destination whose CPU lacks a feature of the source's.
        criu_options: further options for ``criu dump`` in the source and ``criu restore`` in the
            destination; none for a container.
        log_level: CRIU's ``-v``.
        timeout: seconds that either CRIU may take; None: as long as it makes progress.
        watch: continues the times of attaching.

    Raises:
        UsageError: there is no such process or container, or no such way to verify; or both VMs
            are the same.
        CheckFailed: the tree cannot be moved to that VM; nothing was touched.
        AttemptFailed: among others, with `strict`: the tree writes too fast.
        MoveInDoubt: the destination's tree may run or does, and the source's is there, frozen.
        OvrError: the cause; the tree runs on in the source, and the destination is as it was.
    """
    if verify not in VERIFY_MODES:
        raise UsageError(f"no way to verify called {verify!r}", f"take {', '.join(VERIFY_MODES)}")
    _refuse_itself(source, destination)
    watch = watch or Stopwatch()
    container = tree if isinstance(tree, Container) else None
    name = os.urandom(16).hex()
    with (
        scratch_directory() as scratch,
        Attempt(destination, destination_agent) as arriving,
        Attempt(source, source_agent) as leaving,  # the first to be aborted: its tree runs on
        ExitStack() as stack,
    ):
        images = NewImages(scratch)
        with watch("check"):
            running = Running(tree) if isinstance(tree, int) else tree.find(leaving.agent)
            tree_to_dump(source.kernel, running.pid)
            check_move(leaving, arriving, running, container, cpu=check_cpu)
            # An engine's CRIU reads them.
            unread = {} if container else leaving.agent.criu_config()
        with watch("pool"):
            seats = NO_SEATS if container else seats_of(leaving, running.pid)
            pool = make_pool(arriving, seats)
            store = PoolStore(leaving, arriving, pool, seats)
        with watch("start"), criu_lacked(unread):
            parent = Parent(source.kernel, running.pid)
            leaving.start(
                lambda agent: agent.start_dump(
                    running.pid, parent.new_images(),
                    criu_options=checkpoint_options(container) if container else criu_options,
                    leave_running=container is not None, log_level=log_level, timeout=timeout,
                    engine=container.engine if container else None, name=running.id,
                )
            )  # fmt: skip
        with watch("ahead"):
            pre_copy = PreCopy(leaving, running.pid, store)
            if pool:
                pre_copy.run(rounds, downtime)
                _check_converged(pre_copy, strict=strict)
            leaving.agent.add_to_parent(parent.new_images())
        down = time.perf_counter()
        with watch("stop"), criu_lacked(unread):
            pre_copy.let_stop()
            received = _hold(leaving, images, engine=container is not None)
            stopped = look_at_stopped(leaving, received, images, pre_copy.copies, stack)
        with Commit(leaving, arriving, name) as commit:
            with watch("archive" if container else "plan"):
                if container:
                    commit.prepare()
                checkpoint = stack.enter_context(
                    moved_container(commit, container, images)
                    if container
                    else ImagesCheckpoint(images.path, criu_options)
                )
            arrived = arrive(
                arriving, stopped, checkpoint, move=name, pool=pool, seats=seats, verify=verify,
                log_level=log_level, timeout=timeout, watch=watch,
            )  # fmt: skip
            with watch("commit"):
                if not container:
                    commit.prepare()
                up, _ = commit.run(
                    arrived.root_pid,
                    lambda agent: _let_run(agent, destination.kernel, arrived.root_pid),
                )
        return make_report(
            name, arrived, container=running.id, source=leaving, destination=arriving,
            rounds=pre_copy.rounds, downtime=up - down, watch=watch, verified=verify,
        )  # fmt: skip


def _hold(source: Attempt, images: NewImages, *, engine: bool) -> Received:
    # The destination's agent takes no more, and they are in the host's memory.
    most = min(source.vm.ram.size, MAX_IMAGE_BYTES)
    received = Received(images, most, also=DESCRIPTORS if engine else None)
    source.begin(lambda agent: agent.held(received.save), engine=engine)
    received.check_complete()
    return received


def _refuse_itself(source: AttachedVm, destination: AttachedVm) -> None:
    one, other = (min(vm.ram.slots, key=lambda slot: slot.gpa) for vm in (source, destination))
    if os.path.sameopenfile(one.file.fileno(), other.file.fileno()):
        error = UsageError(
            "the source and the destination are the same VM", "name the VM that gets the tree"
        )
        error.code = "same-vm"
        raise error


def _check_converged(pre_copy: PreCopy, *, strict: bool) -> None:
    left, few = pre_copy.left
    if left <= few:
        return
    text = f"the tree writes too fast: {left >> 20} MiB are left, where {few >> 20} MiB are few"
    if strict:
        error = AttemptFailed(text, "it runs on in the source; give a longer --downtime")
        error.code = "not-converging"
        raise error
    log.warning("%s", text)


def _let_run(agent: Agent, kernel: Kernel, root_pid: int) -> float:
    let_run(agent, kernel, root_pid)
    return time.perf_counter()
