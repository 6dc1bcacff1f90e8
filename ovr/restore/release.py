"""Commit: the guest's CRIU lets the restored tree run."""

from ovr.errors import AttemptFailed
from ovr.guest.client.agent import Agent
from ovr.guest.client.results import Restored
from ovr.kernel import Kernel, find_task, settled

__all__ = ["let_run"]


def let_run(agent: Agent, kernel: Kernel, root_pid: int) -> Restored:
    """Let the tree run, and check that it does.

    The agent's answer is not trusted alone: CRIU traces what it holds. A task that is gone has run
    and ended, as far as can be seen from here.

    Args:
        agent: the agent.
        kernel: the guest's kernel.
        root_pid: pid of the skeleton's root task.

    Raises:
        AttemptFailed: CRIU failed at the last moment; or the tree is still held.
        AgentUnreachable: the link broke.
    """
    root = agent.go()

    def held() -> bool:
        task = find_task(kernel, root_pid)
        return task is not None and bool(task.ptrace)

    wrong = ""
    if root.pid != root_pid:
        wrong = f"the skeleton was pid {root_pid}"
    elif settled(held):
        wrong = "it is still held"
    if wrong:
        raise AttemptFailed(
            f"the agent reports that pid {root.pid} runs, but {wrong}",
            "the agent kills it when ovr ends; is this agent the guest's own, and unchanged?",
        )
    return root
