"""One restore, step by step: docs/architecture.md, section 1, as code."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from ovr.attempt import settings
from ovr.attempt.attempt import Attempt
from ovr.attempt.copier import VERIFY_MODES
from ovr.attempt.stopwatch import Stopwatch
from ovr.checkpoint import Checkpoint
from ovr.errors import UsageError
from ovr.images.source import Sources
from ovr.plan import NOT_DUMPED, Plan, Warm, check_kinds, make_plan
from ovr.restore.allocation import allocate_outside
from ovr.restore.preflight import refuse_taken_pids
from ovr.restore.release import let_run
from ovr.restore.report import Report, make_report
from ovr.restore.skeleton import build_skeleton, inside_of
from ovr.vm.attach import AttachedVm

__all__ = ["VERIFY_MODES", "restore"]

log = logging.getLogger("ovr.restore")


def restore(
    vm: AttachedVm,
    checkpoint: Checkpoint,
    *,
    agent: str | None = None,
    outside: Sequence[str] = ("all",),
    verify: str = "sample",
    log_level: int = 2,
    timeout: float | None = None,
    watch: Stopwatch | None = None,
) -> Report:
    """Restore a checkpoint into the VM and let the tree run.

    Args:
        vm: attached writable.
        checkpoint: what to restore, and what in the guest builds the tree; it is only read.
        agent: the agent's address; None: as the VM's devices say.
        outside: the kinds of state to write from outside, groups of them, or ``all``.
        verify: read back none of the memory, a ``sample``, or all (``full``).
        log_level: CRIU's ``-v``, where CRIU is not run by an engine.
        timeout: seconds that CRIU or an engine may take to build the skeleton; None: as long as it
            makes progress.
        watch: continues the times of attaching.

    Raises:
        UsageError: no such kind of state, or no such way to verify.
        OvrError: the cause; everything that was built in the guest is gone, the VM runs on.
    """
    check_kinds(outside)
    if verify not in VERIFY_MODES:
        raise UsageError(f"no way to verify called {verify!r}", f"take {', '.join(VERIFY_MODES)}")
    watch = watch or Stopwatch()
    with Sources() as sources, Attempt(vm, agent) as attempt:  # aborted before sources may block
        with watch("plan"):
            guest = attempt.agent.hello
            checkpoint.check(guest)
            refuse_taken_pids(checkpoint.images, vm.kernel)
            plan = _plan(checkpoint, outside, force_write=guest.force_write)
            inside = inside_of(plan, checkpoint, guest)
        with watch("skeleton"):
            sources.read_ahead(plan.sources())
            built = build_skeleton(
                attempt, checkpoint, inside, timeout=timeout, log_level=log_level
            )
        with watch("populate"):
            warm = isinstance(built.memory, Warm)
            memory = allocate_outside(plan, attempt.tree(), attempt.agent, sources.of, warm=warm)
        copier = attempt.copier(watch.counter(memory.bytes))
        with watch("memory"):
            copier.copy(memory.families, memory.targets)
        with watch("state"):
            settings.write(plan.settings, attempt.tree, attempt.holder, attempt.recording)
        with watch("verify"):
            settings.verify(plan.settings, attempt.tree())
            sources.check_unchanged()
            compared = copier.verify(memory.all, verify)
            sources.check_unchanged()
        with watch("commit"):
            root = attempt.commit(lambda agent: let_run(agent, vm.kernel, built.root_pid))
            root = replace(root, container=root.container or checkpoint.container)
        return make_report(plan, attempt, built, root, watch=watch, verified=(verify, compared))


def _plan(checkpoint: Checkpoint, outside: Sequence[str], *, force_write: bool) -> Plan:
    plan = make_plan(checkpoint.images, outside, force_write=force_write)
    for pid, lost in plan.not_dumped.items():
        log.warning("pid %d: %d MiB of %s", pid, lost >> 20, NOT_DUMPED)
    return plan
