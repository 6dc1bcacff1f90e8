"""Mutual authentication of host and agent, before anything valuable is sent.

The host proves that it can read the VM's RAM, the agent that it runs as root of the guest. Both
know a secret in the agent's memory (`ovr.guest.client.secret_page`).
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Final

from ovr.errors import AgentUnreachable, AgentUntrusted, GuestFault, KernelNotFound, OvrError
from ovr.guest.client.agent import Agent
from ovr.guest.client.secret_page import AgentProcess, NotTheAgent, read_secret
from ovr.kernel import Kernel
from ovr.memory.ram import Slot
from ovr.vm.hold import Holder, unbroken
from ovr.vm.lock import locked
from ovr.vm.qmp import Monitor

__all__ = ["authenticate", "authenticate_alone", "check_same_guest"]

_TRIES: Final = 20
_PAUSE: Final = 0.01  # seconds; the guest may be moving the page
_HINT: Final = (
    "a user of the guest may pose as the agent: look at that process; else ovr-agent must run"
    " as root in the VM that --vm names, outside of any container"
)


def authenticate(kernel: Kernel, agent: Agent, holder: Holder) -> AgentProcess:
    """Authenticate to the agent, and make sure that it is root's in this VM.

    Args:
        kernel: the guest's kernel.
        agent: not trusted so far.
        holder: holds the VM.

    Raises:
        AgentUntrusted: it is not the agent, or the agent of another VM.
        KernelNotFound: invalid types of the guest's kernel.
        AgentUnreachable: the link broke.
        OvrError: the VM cannot be held.
    """
    try:
        process = _process(kernel, agent, holder)
    except NotTheAgent as wrong:
        raise AgentUntrusted(
            f"the agent at {agent.address} is not root's: {wrong}", _HINT, wrong.code
        ) from wrong
    agent.authenticate(process.secret)
    return process


def authenticate_alone(
    kernel: Kernel, agent: Agent, qmp: Monitor, slots: Sequence[Slot]
) -> AgentProcess:
    """Lock and hold the VM just to `authenticate`.

    Args:
        kernel: the guest's kernel.
        agent: not trusted so far.
        qmp: a connection to the VM.
        slots: its RAM.

    Raises:
        CheckFailed: another `ovr` restores into the VM; its holds and ours would end each other.
        OvrError: as `authenticate`.
    """
    with ExitStack() as stack:
        stack.enter_context(locked(slots))
        return authenticate(kernel, agent, stack.enter_context(Holder(qmp)))


def check_same_guest(kernel: Kernel, agent: Agent) -> None:
    """Make sure that the agent runs in the boot of the guest that `kernel` was found in.

    The guest may have been rebooted since, and the agent may be in any VM. `authenticate` does not
    tell: the memory of a dead kernel may still have a secret where it is looked for.

    Raises:
        AgentUnreachable: it does not.
    """
    try:
        found = kernel.boot_id
    except KernelNotFound:
        return  # built without the symbols of data; the skeleton that is not there tells, too
    if found != agent.hello.boot_id:
        raise AgentUnreachable(
            f"the guest was rebooted since ovr attached to it, or the agent at"
            f" {agent.address} is in another VM",
            "if the VM is the right one, restore again; else give --agent",
        )


def _process(kernel: Kernel, agent: Agent, holder: Holder) -> AgentProcess:
    pid, address = agent.hello.pid, agent.hello.secret_at
    with suppress(OvrError, NotTheAgent):
        # The kernel's types are parsed when first asked for: not in a hold.
        read_secret(kernel, pid, address)
    fault: GuestFault | None = None
    for _ in range(_TRIES):
        try:
            return unbroken(holder, lambda: read_secret(kernel, pid, address))
        except GuestFault as error:
            fault = error
            time.sleep(_PAUSE)
    raise NotTheAgent("secret", str(fault)) from fault
