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
from ovr.dump.output import NewImages
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
from ovr.move.commit import commit
from ovr.move.pool import PoolStore, make_pool, seats_of
from ovr.move.preflight import check_move
from ovr.move.report import MoveReport, make_report
from ovr.move.scratch import scratch_directory
from ovr.move.stopped import look_at_stopped
from ovr.restore.release import let_run
from ovr.vm.attach import AttachedVm

__all__ = ["DOWNTIME", "move"]

log = logging.getLogger("ovr.move")

DOWNTIME: Final = 0.3
"""Default for the time in which the last changes are copied, in seconds."""


def move(
    source: AttachedVm,
    destination: AttachedVm,
    pid: int,
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
        pid: the root task, in the source's initial pid namespace.
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
            destination.
        log_level: CRIU's ``-v``.
        timeout: seconds that either CRIU may take; None: as long as it makes progress.
        watch: continues the times of attaching.

    Raises:
        UsageError: there is no such process, or no such way to verify; or both VMs are the same.
        CheckFailed: the tree cannot be moved to that VM; nothing was touched.
        AttemptFailed: among others, with `strict`: the tree writes too fast.
        MoveInDoubt: the destination's tree may run or does, and the source's is there, frozen.
        OvrError: the cause; the tree runs on in the source, and the destination is as it was.
    """
    if verify not in VERIFY_MODES:
        raise UsageError(f"no way to verify called {verify!r}", f"take {', '.join(VERIFY_MODES)}")
    _refuse_itself(source, destination)
    watch = watch or Stopwatch()
    name = os.urandom(16).hex()
    with (
        scratch_directory() as scratch,
        Attempt(destination, destination_agent) as arriving,
        Attempt(source, source_agent) as leaving,  # the first to be aborted: its tree runs on
        ExitStack() as stack,
    ):
        images = NewImages(scratch)
        with watch("check"):
            tree_to_dump(source.kernel, pid)
            check_move(leaving, arriving, pid, cpu=check_cpu)
            unread = leaving.agent.criu_config()
        with watch("pool"):
            seats = seats_of(leaving, pid)
            pool = make_pool(arriving, seats)
            store = PoolStore(leaving, arriving, pool, seats)
        with watch("start"), criu_lacked(unread):
            parent = Parent(source.kernel, pid)
            leaving.start(
                lambda agent: agent.start_dump(
                    pid, parent.new_images(), criu_options=criu_options, log_level=log_level,
                    timeout=timeout,
                )
            )  # fmt: skip
        with watch("ahead"):
            pre_copy = PreCopy(leaving, pid, store)
            pre_copy.run(rounds, downtime)
            _check_converged(pre_copy, strict=strict)
            leaving.agent.add_to_parent(parent.new_images())
        down = time.perf_counter()
        with watch("stop"), criu_lacked(unread):
            pre_copy.let_stop()
            # The destination's agent takes no more, and they are in the host's memory.
            received = Received(images, min(source.ram.size, MAX_IMAGE_BYTES))
            leaving.begin(lambda agent: agent.held(received.save))
            received.check_complete()
            stopped = look_at_stopped(leaving, received, images, pre_copy.copies, stack)
        arrived = arrive(
            arriving, stopped, images, stack, move=name, pool=pool, seats=seats, verify=verify,
            criu_options=criu_options, log_level=log_level, timeout=timeout, watch=watch,
        )  # fmt: skip
        with watch("commit"):
            up, _ = commit(
                leaving, arriving, name, arrived.root_pid,
                lambda agent: _let_run(agent, destination.kernel, arrived.root_pid),
            )  # fmt: skip
        return make_report(
            name, arrived, source=leaving, destination=arriving, rounds=pre_copy.rounds,
            downtime=up - down, watch=watch, verified=verify,
        )  # fmt: skip


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
