"""One restore, step by step: docs/architecture.md, section 1, as code."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Final

from ovr.checkpoint import Checkpoint
from ovr.errors import AgentUnreachable, OvrError, PidTaken, RestoreFailed
from ovr.images.source import Sources
from ovr.kernel import find_task
from ovr.outside import Outside, find_outside
from ovr.plan import Plan, make_plan
from ovr.report import Report, Stopwatch
from ovr.state import GuestTree, settings
from ovr.state.memory import Copier
from ovr.vm.agent import Agent, Skeleton
from ovr.vm.attach import AttachedVm
from ovr.vm.hold import Holder
from ovr.vm.memory_map import refusals

__all__ = ["VERIFY_MODES", "restore"]

VERIFY_MODES: Final = ("none", "sample", "full")

log = logging.getLogger("ovr.restore")


def restore(
    vm: AttachedVm,
    checkpoint: Checkpoint,
    *,
    agent: str | None = None,
    outside: Sequence[str] = ("all",),
    verify: str = "sample",
    log_level: int = 2,
    watch: Stopwatch | None = None,
) -> Report:
    """Restore a checkpoint into the VM and let the tree run.

    Args:
        vm: attached writable.
        checkpoint: what to restore, and what in the guest builds the tree; it is only read.
        agent: the agent's address; lab VMs know their own.
        outside: the kinds of state to write from outside, groups of them, or ``all``.
        verify: read back none of the memory, a ``sample``, or all (``full``).
        log_level: how much the guest's CRIU logs (its ``-v``), where it is not an engine's.
        watch: goes on counting where attaching left off.

    Raises:
        OvrError: what went wrong; whatever was built in the guest is gone, the VM runs on.
    """
    watch = watch or Stopwatch()
    with ExitStack() as stack:
        with watch("plan"):
            plan = make_plan(checkpoint.images, outside)
        _refuse(vm, plan)
        link = stack.enter_context(Agent.connect(_address(vm, agent)))
        checkpoint.check(link.hello)
        with watch("plan"):
            if not link.hello.force_write:
                plan = make_plan(checkpoint.images, outside, force_write=False)
            files = checkpoint.files(plan.inside_images())
        with watch("skeleton"):
            skeleton = link.begin(
                files, criu_options=checkpoint.options, engine=checkpoint.engine,
                timeout=checkpoint.patience, log_level=log_level,
            )  # fmt: skip
        log.info("skeleton stands: pid %d, %d threads", skeleton.root_pid, len(skeleton.tasks))
        with _killed_on_error(link), link.keep_alive():
            sources = stack.enter_context(Sources())
            with watch("populate"):
                memory = find_outside(plan, _guest(vm, skeleton), link, sources)
            copier = stack.enter_context(_copier(vm, _counter(watch, memory.bytes)))
            with watch("memory"):
                left = copier.write_families(memory.families)
                copier.write([*left, *((target, target.pieces) for target in memory.targets)])
            with watch("state"):
                settings.write(plan.settings, lambda: _guest(vm, skeleton), copier.holder)
            with watch("verify"):
                settings.verify(plan.settings, _guest(vm, skeleton))
                compared = _verify(copier, memory, verify)
        with watch("commit"):
            root = link.go(checkpoint.patience)
        watch.seconds["total"] = watch.total()
        return Report(
            pid=root.pid,
            container=root.container or checkpoint.container,
            tasks=len(plan.tasks),
            states=plan.states,
            bytes_total=plan.bytes_total,
            bytes_outside=plan.bytes_outside,
            bytes_inside=plan.bytes_total - plan.bytes_outside,
            bytes_cow=plan.bytes_cow,
            verified=verify,
            bytes_verified=compared,
            seconds=watch.seconds,
            held=copier.holder.as_json(),
        )


def _address(vm: AttachedVm, agent: str | None) -> str:
    address = agent or vm.address.agent
    if address is None:
        raise AgentUnreachable(
            f"nobody said where the agent of {vm.address.spec} is", "give --agent ADDR"
        )
    return address


def _refuse(vm: AttachedVm, plan: Plan) -> None:
    for reason in refusals(vm.qmp):
        raise reason
    # CRIU would find a taken pid too, but only after it has built half of a tree. A tree whose
    # root is pid 1 brings a pid namespace of its own, where nothing is taken.
    tasks = plan.images.tasks
    if tasks[0].pid == 1:
        return
    for tid in (tid for task in tasks for tid in task.threads):
        if taken := find_task(vm.kernel, tid):
            raise PidTaken(
                f"pid {tid} is taken in the guest by {taken.comm!r}",
                "end that process and restore again; images can only come back with their pids",
            )


@contextmanager
def _killed_on_error(link: Agent) -> Iterator[None]:
    # Nothing half-restored ever runs: whatever happens before the commit, the tree goes.
    try:
        yield
    except BaseException:
        try:
            link.abort()
        except OvrError as error:
            # The link is broken; the agent sees that too, and kills the tree by itself.
            log.warning("the agent does not confirm the abort: %s", error)
        raise


@contextmanager
def _copier(vm: AttachedVm, advance: Callable[[int], None]) -> Iterator[Copier]:
    threads = min(len(os.sched_getaffinity(0)), 8)
    with Holder(vm.qmp) as holder, ThreadPoolExecutor(threads) as pool:
        yield Copier(holder, pool, threads, advance)


def _counter(watch: Stopwatch, size: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        watch.advance(done, size)

    return advance


def _verify(copier: Copier, memory: Outside, mode: str) -> int:
    return 0 if mode == "none" else copier.verify(memory.all, full=mode == "full")


def _guest(vm: AttachedVm, skeleton: Skeleton) -> GuestTree:
    root = find_task(vm.kernel, skeleton.root_pid)
    if root is None:
        raise RestoreFailed(
            f"the agent says that the skeleton stands, but pid {skeleton.root_pid} is not there",
            "is this agent in the VM that --vm names?",
        )
    return GuestTree(vm.kernel, root)
