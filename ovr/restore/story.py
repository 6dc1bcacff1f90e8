"""One restore, step by step: docs/architecture.md, section 1, as code."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Final

from ovr.attempt import settings
from ovr.attempt.authentication import prove
from ovr.attempt.copier import Copier
from ovr.attempt.journal import Journal
from ovr.attempt.stopwatch import Span, Stopwatch
from ovr.attempt.undo import Recording
from ovr.checkpoint import Checkpoint
from ovr.errors import (
    AgentUnreachable,
    CriuFailed,
    ImagesUnsupported,
    KernelNotFound,
    OvrError,
    PidTaken,
    RestoreFailed,
)
from ovr.guest.client.agent import Agent, Skeleton
from ovr.guest.client.secret_page import AgentProcess
from ovr.guest.client.tracer import find_tracer
from ovr.guest.protocol import MAX_IMAGE_BYTES
from ovr.images import Extents, image_size
from ovr.images.regular import regular_file
from ovr.images.source import Sources
from ovr.kernel import find_task, settled
from ovr.memory.addresses import Gva
from ovr.plan import NOT_DUMPED, Plan, make_plan
from ovr.plan.pool.layout import Pool
from ovr.plan.pool.table import WarmPlan, foreign_cgroup
from ovr.restore.allocation import Outside, find_outside, sources_of
from ovr.restore.report import Report
from ovr.state import GuestTree
from ovr.vm.attach import AttachedVm
from ovr.vm.blockers import refusals, refuse_migration
from ovr.vm.hold import Holder
from ovr.vm.lock import claimed

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
    timeout: float | None = None,
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
        timeout: seconds that CRIU or an engine may take until the skeleton stands; None: as long as
            it makes progress.
        watch: goes on counting where attaching left off.

    Raises:
        OvrError: what went wrong; whatever was built in the guest is gone, the VM runs on.
    """
    watch = watch or Stopwatch()
    with ExitStack() as stack:
        stack.enter_context(claimed(vm.ram.slots))
        with watch("plan"):
            plan = _plan(checkpoint, outside)
        _refuse(vm, plan)
        holder = stack.enter_context(Holder(vm.qmp, vm.check_same_boot, ram=vm.ram))
        link, process = _agent(vm, agent, holder, stack)
        checkpoint.check(link.hello)
        with watch("plan"):
            if not link.hello.force_write:
                plan = make_plan(checkpoint.images, outside, force_write=False)
            inside, warm = _build(plan, link, checkpoint)
            files = checkpoint.files(inside)
        sources = stack.enter_context(Sources())
        journal = Journal()
        # Before the first byte of it is sent: whatever interrupts us, the tree is told to go.
        with _killed_on_error(link), _unread_config(link, checkpoint) as unread:
            with watch("skeleton"), _files_described(checkpoint):
                sources.read_ahead(sources_of(plan))
                skeleton = link.begin(
                    files, criu_options=checkpoint.options, engine=checkpoint.engine,
                    volumes=checkpoint.volumes, timeout=timeout, log_level=log_level,
                    warm_images=warm.images,
                )  # fmt: skip
                cold = _why_cold(warm, skeleton)
            log.info("skeleton stands: pid %d, %d threads", skeleton.root_pid, len(skeleton.tasks))
            with link.keep_alive():
                with watch("populate"):
                    with holder.held():
                        engine = checkpoint.engine is not None
                        tracer = find_tracer(vm.kernel, process, skeleton.criu_pid, engine=engine)
                    tree = partial(_guest, vm, skeleton, tracer)
                    memory = find_outside(plan, tree(), link, sources, warm=not cold)
                copier = stack.enter_context(
                    _copier(holder, journal, _counter(watch, memory.bytes))
                )
                with watch("memory"):
                    left = copier.write_families(memory.families)
                    copier.write([*left, *((target, target.pieces) for target in memory.targets)])
                    _log_memory(journal)
                recording = Recording(journal, vm.kernel, tree, holder)
                with recording.taken_back_on(BaseException):
                    with watch("state"):
                        settings.write(plan.settings, tree, holder, recording)
                    with watch("verify"):
                        settings.verify(plan.settings, tree())
                        sources.check_unchanged()
                        compared = _verify(copier, memory, verify)
                        sources.check_unchanged()
                    refuse_migration(vm.qmp)
                    vm.check_same_boot()
        # From here on the tree may run, whatever we hear, unless the agent says that it is dead.
        with watch("commit"), recording.taken_back_on(RestoreFailed):
            root = link.go()
            _let_go(vm, skeleton, root.pid)
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
            held=holder.as_json(),
            reasons={reason.name.lower(): count for reason, count in plan.by_reason().items()},
            spans=tuple(watch.spans),
            holds=tuple(
                Span("held", start - watch.start, end - watch.start) for start, end in holder.spans
            ),
            journal=journal,
            skeleton="cold" if cold else "warm",
            skeleton_why=cold,
            bytes_warm=0 if cold else warm.bytes,
            unread_config=unread,
        )


def _plan(checkpoint: Checkpoint, outside: Sequence[str]) -> Plan:
    plan = make_plan(checkpoint.images, outside)
    for pid, lost in plan.not_dumped.items():
        log.warning("pid %d: %d MiB of %s", pid, lost >> 20, NOT_DUMPED)
    return plan


def _agent(
    vm: AttachedVm, address: str | None, holder: Holder, stack: ExitStack
) -> tuple[Agent, AgentProcess]:
    # Whom to believe; up to here nothing of worth was sent.
    link = stack.enter_context(Agent.connect(_address(vm, address)))
    _same_guest(vm, link)
    return link, prove(vm.kernel, link, holder)


def _address(vm: AttachedVm, agent: str | None) -> str:
    address = agent or vm.address.agent
    if address is None:
        raise AgentUnreachable(
            f"nobody said where the agent of {vm.address.spec} is", "give --agent ADDR"
        )
    return address


def _build(
    plan: Plan, link: Agent, checkpoint: Checkpoint
) -> tuple[dict[str, bytes | Extents], WarmPlan]:
    # The inside image set, and how a pool is used for it.
    size = link.hello.warm
    why = ""
    if not size:
        why = "the guest has no pool"
    elif checkpoint.engine is not None:
        why = f"{checkpoint.engine} starts a CRIU of its own"
    elif foreign_cgroup(plan.images, checkpoint.options):
        why = "the tasks belong into a cgroup of their own, and the pool is charged to the agent's"
    if why:
        images, warm = plan.inside_images(), WarmPlan(why=why)
    else:
        images, warm = plan.warm_images(Pool(size, link.hello.criu or "", link.hello.warm_at))
    _refuse_large(images)
    return images, warm


def _why_cold(warm: WarmPlan, skeleton: Skeleton) -> str:
    # Nothing if the skeleton has its memory from the pool.
    why = warm.why
    if not why and not skeleton.warm:
        why = skeleton.note or "the guest did not use the pool"
    if why:
        log.info("cold skeleton: %s", why)
    elif skeleton.warm != warm.size or skeleton.note:
        log.warning(
            "only %d of %d MiB came from the pool: %s",
            skeleton.warm >> 20, warm.size >> 20, skeleton.note,
        )  # fmt: skip
    return why


def _refuse(vm: AttachedVm, plan: Plan) -> None:
    vm.check_same_boot()
    for reason in refusals(vm.qmp, vm.balloon):
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


def _same_guest(vm: AttachedVm, link: Agent) -> None:
    # Between attaching and here the guest may have been rebooted, and the agent may be in any VM.
    # `prove` asks something else: a dead kernel's memory, too, may have a secret where it is looked
    # for.
    try:
        found = vm.kernel.boot_id
    except KernelNotFound:
        return  # built without the symbols of data; the skeleton that is not there tells, too
    if found != link.hello.boot_id:
        raise AgentUnreachable(
            f"the guest was rebooted since ovr attached to it, or the agent at"
            f" {link.address} is in another VM",
            "if the VM is the right one, restore again; else give --agent",
        )


def _refuse_large(images: Mapping[str, bytes | Extents]) -> None:
    size = sum(map(image_size, images.values()))
    if size > MAX_IMAGE_BYTES:
        raise ImagesUnsupported(
            f"{size} bytes of images would go to the guest's CRIU, which gets at most"
            f" {MAX_IMAGE_BYTES}",
            "restore more from outside (--outside all); `ovr plan` says what stays inside, and why",
        )


@contextmanager
def _killed_on_error(link: Agent) -> Iterator[None]:
    # Nothing half-restored ever runs: whatever happens before the commit, the tree goes.
    try:
        yield
    except BaseException as cause:
        try:
            link.abort()
        except OvrError as error:
            # The link is broken; the agent sees that too, and kills the tree by itself. Where the
            # agent has said what is wrong it has ended the session, and all that was built.
            said = isinstance(cause, OvrError) and cause.code
            level = logging.INFO if said else logging.WARNING
            log.log(level, "the agent does not confirm the abort: %s", error)
        raise


@contextmanager
def _files_described(checkpoint: Checkpoint) -> Iterator[None]:
    # CRIU names a file that it misses; the images tell what it was.
    try:
        yield
    except CriuFailed as error:
        with suppress(OvrError):  # nothing about the images is worse than what has happened
            if error.file and (was := regular_file(checkpoint.images, error.file)):
                error.hint += f"; {was}"
        raise


@contextmanager
def _unread_config(link: Agent, checkpoint: Checkpoint) -> Iterator[Mapping[str, str]]:
    # CRIU may lack an option of its configuration files, which only an engine's CRIU reads.
    unread = {} if checkpoint.engine is not None else link.criu_config()
    try:
        yield unread
    except CriuFailed as error:
        error.unread_config = unread
        raise


def _log_memory(journal: Journal) -> None:
    for write in journal.memory:
        logging.getLogger("ovr.journal").info("%s", write)


@contextmanager
def _copier(holder: Holder, journal: Journal, advance: Callable[[int], None]) -> Iterator[Copier]:
    threads = min(len(os.sched_getaffinity(0)), 8)
    with ThreadPoolExecutor(threads) as pool:
        yield Copier(holder, pool, threads, journal, advance)


def _counter(watch: Stopwatch, size: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        watch.advance(done, size)

    return advance


def _verify(copier: Copier, memory: Outside, mode: str) -> int:
    return 0 if mode == "none" else copier.verify(memory.all, full=mode == "full")


def _let_go(vm: AttachedVm, skeleton: Skeleton, pid: int) -> None:
    # The agent's word is not all there is: CRIU traces what it holds. A task that is not there any
    # more has run and ended, for all that can be seen from here.
    def held() -> bool:
        root = find_task(vm.kernel, skeleton.root_pid)
        return root is not None and bool(root.ptrace)

    wrong = ""
    if pid != skeleton.root_pid:
        wrong = f"the skeleton was pid {skeleton.root_pid}"
    elif settled(held):
        wrong = "it is still held"
    if wrong:
        raise RestoreFailed(
            f"the agent says that pid {pid} runs, but {wrong}",
            "the agent kills it when ovr ends; is this agent the guest's own, and unchanged?",
        )


def _guest(vm: AttachedVm, skeleton: Skeleton, tracer: Gva) -> GuestTree:
    root = find_task(vm.kernel, skeleton.root_pid)
    if root is None:
        raise RestoreFailed(
            f"the agent says that the skeleton stands, but pid {skeleton.root_pid} is not there",
            "is this agent in the VM that --vm names?",
        )
    return GuestTree(vm.kernel, root, tracer)
