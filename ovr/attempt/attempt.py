"""One attempt at changing what runs in a VM: it is committed, or it leaves nothing behind."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self, TypeVar

from ovr.attempt.alive import Alive, alive_with_pool
from ovr.attempt.authentication import authenticate, check_same_guest
from ovr.attempt.copier import Copier
from ovr.attempt.journal import Journal
from ovr.attempt.saver import Saver
from ovr.attempt.undo import Recording
from ovr.errors import AgentUnreachable, AttemptFailed, OvrError
from ovr.guest.client.agent import Agent
from ovr.guest.client.results import HeldTree, PoolInfo
from ovr.guest.client.tracer import find_tracer
from ovr.kernel import find_task
from ovr.memory.addresses import Gva
from ovr.state import GuestTree
from ovr.vm.attach import AttachedVm
from ovr.vm.blockers import blockers, refuse_migration
from ovr.vm.hold import Holder, unbroken
from ovr.vm.lock import locked

__all__ = ["Attempt", "agent_address"]

T = TypeVar("T")

log = logging.getLogger("ovr.restore")

_MAX_THREADS = 8


class Attempt:
    """A VM that nobody else writes to, its authenticated agent and, from `begin` on, a held tree.

    A context manager. Leaving it without `commit` aborts, for whatever reason: writes to objects
    that may outlive the tree are reverted, then the agent kills a restored tree, or lets a dumped
    one run on. Nothing half-restored ever runs.

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
        self._address = agent_address(vm, address)
        self._tracer = Gva(0)
        self._held: HeldTree | None = None
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
        with self._stack, self._heartbeat:
            if self._to_abort:
                self._abort(error)

    def start(self, start: Callable[[Agent], None]) -> None:
        """Have the agent start what `begin` completes; leaving without `commit` aborts.

        Args:
            start: `Agent.start_dump`, with its arguments.

        Raises:
            CheckFailed: the VM must not be written to any more.
            OvrError: as `start`.
        """
        self._do(start)

    def begin(self, start: Callable[[Agent], HeldTree], *, engine: bool = False) -> HeldTree:
        """Have the agent hold a tree; from here on leaving without `commit` aborts.

        Args:
            start: `Agent.begin` or `Agent.held`, with its arguments.
            engine: whether a container engine runs CRIU.

        Raises:
            CheckFailed: the VM must not be written to any more.
            OvrError: as `start`.
            AgentUntrusted: the tree is not held by the agent's own CRIU.
        """
        held = self._held = self._do(start)
        self._tracer = unbroken(
            self.holder,
            lambda: find_tracer(self.vm.kernel, self._process, held.criu_pid, engine=engine),
        )
        return held

    def tree(self) -> GuestTree:
        """Look for the held tree in the guest, anew.

        Raises:
            AttemptFailed: it is not there.
        """
        assert self._held is not None, "tree() before begin()"
        pid = self._held.root_pid
        root = find_task(self.vm.kernel, pid)
        if root is None:
            raise AttemptFailed(
                f"the agent reports a held tree, but the guest has no process {pid}",
                "is this agent in the VM that --vm names?",
            )
        return GuestTree(self.vm.kernel, root, self._tracer)

    def copier(self, advance: Callable[[int], None], *, origin: Holder | None = None) -> Copier:
        """Return a copier of pages.

        Args:
            advance: called with the size of every copy, in bytes.
            origin: holds the VM that pages come from, if that is another one.
        """
        return Copier(
            self.holder, self._executor, self._threads, self.journal, advance, origin=origin
        )

    def saver(self, advance: Callable[[int], None]) -> Saver:
        """Return a saver of pages; `advance` is called with the size of every copy, in bytes."""
        return Saver(self.holder, self._executor, self._threads, advance)

    def commit(self, go: Callable[[Agent], T]) -> T:
        """Commit: from here on leaving does not abort.

        Args:
            go: has the agent do it, and checks that it was done.

        Raises:
            CheckFailed: the VM is being migrated.
            AttemptFailed: the guest was rebooted.
            OvrError: as `go`.
        """
        refuse_migration(self.vm.qmp)
        self.vm.check_same_boot()
        self._heartbeat.close()
        # From here on it may be done, whatever we receive, unless the agent reports that it is not.
        self._to_abort = False
        with self.recording.reverted_on(AttemptFailed):
            return go(self.agent)

    def abort(self) -> None:
        """Abort now; leaving does nothing then.

        Raises:
            AttemptFailed, AgentUnreachable: as `Agent.abort`.
        """
        self._heartbeat.close()
        self._to_abort = False
        self.agent.abort()

    def keep(self) -> None:
        """From here on leaving does not abort; the session goes on until `commit` or `abort`."""
        self._to_abort = False

    def leave(self) -> None:
        """Do not abort: what is held stays as it is, and is left to another session."""
        self._heartbeat.close()
        self._to_abort = False

    def find_pool(self, pool: PoolInfo) -> Alive:
        """Find the process that has the guest's pool, and make sure that it is the agent's.

        Raises:
            AgentUntrusted: it is not the agent's CRIU, or has no such memory.
            AttemptFailed: it is gone.
            GuestFault, KernelNotFound: invalid kernel objects or types in the guest.
        """

        def find() -> Alive:
            # In one hold: another process may get the pid of one that has died.
            find_tracer(self.vm.kernel, self._process, pool.pid, engine=False)
            return alive_with_pool(self.vm.kernel, pool)

        return unbroken(self.holder, find)

    def _do(self, step: Callable[[Agent], T]) -> T:
        self._check_vm()
        begun = self._to_abort
        # Before the first byte is sent: whatever interrupts us, the attempt is aborted.
        self._to_abort = True
        done = step(self.agent)
        if not begun:
            self._heartbeat.enter_context(self.agent.keep_alive())
        return done

    def _check_vm(self) -> None:
        self.vm.check_same_boot()
        for blocker in blockers(self.vm.qmp, self.vm.balloon):
            raise blocker

    def _abort(self, cause: BaseException | None) -> None:
        try:
            # While a task of the tree is there it is certain which objects were written to.
            self.recording.revert(cause)
        finally:
            try:
                self._heartbeat.close()
            finally:
                self._abort_by_agent(cause)

    def _abort_by_agent(self, cause: BaseException | None) -> None:
        try:
            self.agent.abort()
        except OvrError as error:
            # The link is broken; the agent notices, and aborts. An agent that has reported a
            # failure has aborted, and ended the session.
            reported = isinstance(cause, OvrError) and cause.code
            level = logging.INFO if reported else logging.WARNING
            log.log(level, "the agent does not confirm the abort: %s", error)


def agent_address(vm: AttachedVm, given: str | None) -> str:
    """Return the address of the VM's agent: the one given, or the one that its devices tell.

    Raises:
        AgentUnreachable: neither is known.
    """
    address = given or vm.address.agent
    if address is None:
        raise AgentUnreachable(
            f"no agent address is known for {vm.address.spec}", "give --agent ADDR"
        )
    return address
