"""Showing the agent that we can read the VM's RAM, and ourselves that the agent is in this VM."""

from ovr.addresses import Gva
from ovr.errors import GuestFault, RestoreFailed
from ovr.guest import protocol
from ovr.kernel import Kernel, find_task, mm_space, settled
from ovr.vm.agent import Agent

__all__ = ["prove"]


def prove(kernel: Kernel, agent: Agent) -> None:
    """Tell the agent what lies in its memory, so that it takes a restore from us.

    Raises:
        RestoreFailed: the guest has no such process or memory; the agent may be in another VM.
        GuestFault, KernelNotFound: kernel objects of the guest make no sense.
        AgentUnreachable: the link broke.
    """
    hello = agent.hello

    def read() -> bytes | None:
        task = find_task(kernel, hello.pid)
        if task is None or not task.mm:
            return None
        return mm_space(kernel, task.mm).read(Gva(hello.secret_at), protocol.SECRET_SIZE)

    try:
        secret = settled(read)
    except GuestFault as error:
        raise _elsewhere(hello.pid) from error
    if secret is None:
        raise _elsewhere(hello.pid)
    agent.prove(secret)


def _elsewhere(pid: int) -> RestoreFailed:
    return RestoreFailed(
        f"the agent says that it is the guest's process {pid}, which has no such memory",
        "is this agent in the VM that --vm names, and outside of any container there?",
    )
