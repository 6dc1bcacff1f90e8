"""Host and agent prove to each other who they are, before anything of worth is sent.

The host shows that it can read the VM's RAM, the agent that it is root of the guest's; what they
share is a secret in the agent's memory (`ovr.guest.client.secret_page`).
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Final

from ovr.errors import AgentUntrusted, GuestFault, OvrError
from ovr.guest.client.agent import Agent
from ovr.guest.client.secret_page import AgentProcess, NotTheAgents, read_secret
from ovr.kernel import Kernel
from ovr.memory.ram import Slot
from ovr.vm.hold import Holder
from ovr.vm.lock import claimed
from ovr.vm.qmp import Monitor

__all__ = ["prove", "prove_alone"]

_TRIES: Final = 20
_PAUSE: Final = 0.01  # seconds in which the guest moves a page
_HINT: Final = (
    "a user of the guest may pose as the agent: look what that process is; else ovr-agent must run"
    " as root in the VM that --vm names, outside of any container"
)


def prove(kernel: Kernel, agent: Agent, holder: Holder) -> AgentProcess:
    """Prove that we can read the VM's RAM, and make sure that the agent is root's in this VM.

    Args:
        kernel: the guest's kernel.
        agent: who answers; nothing that it said so far was believed.
        holder: of the VM.

    Raises:
        AgentUntrusted: it is not the agent, or the agent of another VM.
        KernelNotFound: the types of the guest's kernel make no sense.
        AgentUnreachable: the link broke.
        OvrError: the VM cannot be held.
    """
    try:
        process = _process(kernel, agent, holder)
    except NotTheAgents as wrong:
        raise AgentUntrusted(
            f"the agent at {agent.address} is not root's: {wrong}", _HINT, wrong.code
        ) from wrong
    agent.prove(process.secret)
    return process


def prove_alone(kernel: Kernel, agent: Agent, qmp: Monitor, slots: Sequence[Slot]) -> AgentProcess:
    """As `prove`, where nothing else is to be held.

    Args:
        kernel: the guest's kernel.
        agent: who answers.
        qmp: a connection to the VM.
        slots: its RAM.

    Raises:
        CheckFailed: another `ovr` restores into the VM; its holds and ours would end each other.
        OvrError: as `prove`.
    """
    with ExitStack() as stack:
        stack.enter_context(claimed(slots))
        return prove(kernel, agent, stack.enter_context(Holder(qmp)))


def _process(kernel: Kernel, agent: Agent, holder: Holder) -> AgentProcess:
    pid, address = agent.hello.pid, agent.hello.secret_at
    with suppress(OvrError, NotTheAgents):
        # The kernel's types are parsed when first asked for: not in a hold.
        read_secret(kernel, pid, address)
    fault: GuestFault | None = None
    for _ in range(_TRIES):
        try:
            with holder.held():
                return read_secret(kernel, pid, address)
        except GuestFault as error:
            fault = error
            time.sleep(_PAUSE)
    raise NotTheAgents("secret", str(fault)) from fault
