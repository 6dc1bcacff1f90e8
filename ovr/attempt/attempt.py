"""One attempt at changing what runs in a VM: it is committed, or it leaves nothing behind."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from ovr.attempt.authentication import authenticate, check_same_guest
from ovr.attempt.copier import Copier
from ovr.attempt.journal import Journal
from ovr.attempt.undo import Recording
from ovr.errors import AgentUnreachable, OvrError, RestoreFailed
from ovr.guest.client.agent import Agent, Restored, Skeleton
from ovr.guest.client.requests import Files
from ovr.guest.client.tracer import find_tracer
from ovr.kernel import find_task, settled
from ovr.memory.addresses import Gva
from ovr.state import GuestTree
from ovr.vm.attach import AttachedVm
from ovr.vm.blockers import blockers, refuse_migration
from ovr.vm.hold import Holder
from ovr.vm.lock import locked

__all__ = ["Attempt"]

log = logging.getLogger("ovr.restore")

_MAX_THREADS = 8


class Attempt:
    """A VM that nobody else writes to, its authenticated agent and, from `begin` on, a held tree.

    A context manager. Leaving it without `commit` aborts, for whatever reason: writes to objects
    that may outlive the tree are reverted, then the agent kills the tree. Nothing half-restored
    ever runs.

    Args:
        vm: attached writable.
        address: the agent's; None: as the VM's devices say.

    Attributes:
        vm: the VM.
        holder: holds it; guest RAM can be written only in a hold.
        agent: the agent, authenticated.
        journal: the writes.
        recording: records writes to kernel objects in the journal, and reverts them.

    Raises:
        CheckFailed: the VM must not be written to, or another `ovr` writes to it.
        AgentUnreachable: no agent, or that of another VM or boot.
        AgentUntrusted: it is not root's in this VM.
        OvrError: the VM cannot be held.
    """

    holder: Holder
    agent: Agent
    recording: Recording

    def __init__(self, vm: AttachedVm, address: str | None = None) -> None:
        self.vm = vm
        self.journal = Journal()
        self._address = _agent_address(vm, address)
        self._tracer = Gva(0)
        self._skeleton: Skeleton | None = None
        self._to_abort = False
        self._stack = ExitStack()
        self._heartbeat = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(locked(self.vm.ram.slots))
            self._check_vm()
            self.holder = stack.enter_context(
                Holder(self.vm.qmp, self.vm.check_same_boot, ram=self.vm.ram)
            )
            self.agent = stack.enter_context(Agent.connect(self._address))
            check_same_guest(self.vm.kernel, self.agent)
            self._process = authenticate(self.vm.kernel, self.agent, self.holder)
            self._threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
            self._executor = stack.enter_context(ThreadPoolExecutor(self._threads))
            self.recording = Recording(self.journal, self.vm.kernel, self.tree, self.holder)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._stack:
            if self._to_abort:
                self._abort(error)

    def begin(
        self,
        images: Files,
        *,
        criu_options: Sequence[str] = (),
        engine: str | None = None,
        volumes: Sequence[str] = (),
        warm_images: Sequence[str] = (),
        timeout: float | None = None,
        log_level: int = 2,
    ) -> Skeleton:
        """Have the agent build a tree and hold it; from here on leaving without `commit` aborts.

        Arguments are those of `Agent.begin`.

        Raises:
            CheckFailed: the VM must not be written to any more.
            OvrError: as `Agent.begin`.
            AgentUntrusted: the tree is not held by the agent's own CRIU.
        """
        self._check_vm()
        # Before the first byte is sent: whatever interrupts us, the tree is killed.
        self._to_abort = True
        skeleton = self.agent.begin(
            images, criu_options=criu_options, engine=engine, volumes=volumes,
            warm_images=warm_images, timeout=timeout, log_level=log_level,
        )  # fmt: skip
        self._heartbeat.enter_context(self.agent.keep_alive())
        self._skeleton = skeleton
        log.info("skeleton stands: pid %d, %d threads", skeleton.root_pid, len(skeleton.tasks))
        with self.holder.held():
            self._tracer = find_tracer(
                self.vm.kernel, self._process, skeleton.criu_pid, engine=engine is not None
            )
        return skeleton

    def tree(self) -> GuestTree:
        """Look for the held tree in the guest, anew.

        Raises:
            RestoreFailed: it is not there.
        """
        assert self._skeleton is not None, "tree() before begin()"
        pid = self._skeleton.root_pid
        root = find_task(self.vm.kernel, pid)
        if root is None:
            raise RestoreFailed(
                f"the agent reports a skeleton, but the guest has no process {pid}",
                "is this agent in the VM that --vm names?",
            )
        return GuestTree(self.vm.kernel, root, self._tracer)

    def copier(self, advance: Callable[[int], None]) -> Copier:
        """Return a copier of pages; `advance` is called with the size of every copy, in bytes."""
        return Copier(self.holder, self._executor, self._threads, self.journal, advance)

    def commit(self) -> Restored:
        """Let the tree run.

        Raises:
            CheckFailed: the VM is being migrated.
            RestoreFailed: the guest was rebooted; CRIU failed at the last moment; or the tree is
                still held.
            AgentUnreachable: the link broke.
        """
        refuse_migration(self.vm.qmp)
        self.vm.check_same_boot()
        self._heartbeat.close()
        # From here on the tree may run, whatever we receive, unless the agent reports it dead.
        self._to_abort = False
        with self.recording.reverted_on(RestoreFailed):
            root = self.agent.go()
            self._check_released(root.pid)
        return root

    def _check_vm(self) -> None:
        self.vm.check_same_boot()
        for blocker in blockers(self.vm.qmp, self.vm.balloon):
            raise blocker

    def _check_released(self, pid: int) -> None:
        # The agent's answer is not trusted alone: CRIU traces what it holds. A task that is gone
        # has run and ended, as far as can be seen from here.
        assert self._skeleton is not None
        root_pid = self._skeleton.root_pid

        def held() -> bool:
            root = find_task(self.vm.kernel, root_pid)
            return root is not None and bool(root.ptrace)

        wrong = ""
        if pid != root_pid:
            wrong = f"the skeleton was pid {root_pid}"
        elif settled(held):
            wrong = "it is still held"
        if wrong:
            raise RestoreFailed(
                f"the agent reports that pid {pid} runs, but {wrong}",
                "the agent kills it when ovr ends; is this agent the guest's own, and unchanged?",
            )

    def _abort(self, cause: BaseException | None) -> None:
        try:
            # While a task of the tree is there it is certain which objects were written to.
            self.recording.revert(cause)
        finally:
            try:
                self._heartbeat.close()
            finally:
                self._kill(cause)

    def _kill(self, cause: BaseException | None) -> None:
        try:
            self.agent.abort()
        except OvrError as error:
            # The link is broken; the agent notices, and kills the tree. An agent that has reported
            # a failure has ended the session, and killed everything that was built.
            reported = isinstance(cause, OvrError) and cause.code
            level = logging.INFO if reported else logging.WARNING
            log.log(level, "the agent does not confirm the abort: %s", error)


def _agent_address(vm: AttachedVm, given: str | None) -> str:
    address = given or vm.address.agent
    if address is None:
        raise AgentUnreachable(
            f"no agent address is known for {vm.address.spec}", "give --agent ADDR"
        )
    return address
