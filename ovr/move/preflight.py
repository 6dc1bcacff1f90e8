"""Checks of a move before anything is frozen or copied."""

import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple

from ovr.attempt.attempt import Attempt
from ovr.checkpoint import check_engine
from ovr.dump.container import Container, Running
from ovr.errors import CheckFailed, KernelNotFound
from ovr.guest.client.agent import Agent
from ovr.kernel import (
    Kernel,
    Struct,
    find_task,
    for_each_thread,
    pid_nr_ns,
    settled,
    task_active_pid_ns,
    tree_of,
    types_that_fit,
)
from ovr.memory.addresses import Gva

__all__ = ["Problem", "check_move", "problems_of"]

_HARDWARE_WORDS: Final = (0, 1, 4, 6, 9, 10, 12, 16, 18)
"""Words of ``x86_capability`` that CPUID fills (``enum cpuid_leafs``)."""
_SHOWN: Final = 8


class Problem(NamedTuple):
    """A reason why a tree cannot be moved, and its cure."""

    text: str
    cure: str


def check_move(
    source: Attempt,
    destination: Attempt,
    running: Running,
    container: Container | None = None,
    *,
    cpu: bool = True,
) -> None:
    """Check that a tree can be moved.

    Args:
        source: the VM that has it.
        destination: the VM that is to get it.
        running: the tree.
        container: its container, if it is one.
        cpu: compare the CPUs.

    Raises:
        CheckFailed: it cannot; all reasons.
        GuestFault, KernelNotFound: invalid kernel objects or types in a guest.
        AttemptFailed, AgentUnreachable: podman cannot be asked.
    """
    found = [*problems_of(source, destination, running, container, cpu=cpu)]
    if found:
        error = CheckFailed(
            "; ".join(problem.text for problem in found),
            "; ".join(dict.fromkeys(problem.cure for problem in found)),
        )
        error.code = "preflight"
        raise error


def problems_of(
    source: Attempt,
    destination: Attempt,
    running: Running,
    container: Container | None,
    *,
    cpu: bool,
) -> Iterator[Problem]:
    """Yield the reasons why a tree cannot be moved; arguments as for `check_move`."""
    yield from _of_criu(source.agent.hello.criu, destination.agent.hello.criu)
    yield from _of_pids(source.vm.kernel, destination.vm.kernel, running.pid)
    if container:
        yield from _of_container(destination.agent, container, running.id or container.name)
    if cpu:
        yield from _of_cpu(source.vm.kernel, destination.vm.kernel)


def _of_criu(source: str | None, destination: str | None) -> Iterator[Problem]:
    for where, version in (("source", source), ("destination", destination)):
        if version is None:
            yield Problem(f"the {where} has no CRIU", f"apt-get install criu, in the {where}")
    if source and destination and _numbers(destination) < _numbers(source):
        yield Problem(
            f"the destination has CRIU {destination}, older than {source} in the source",
            "install the same CRIU in the destination",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d{1,9}", version)[:2])


@types_that_fit()
def _of_pids(source: Kernel, destination: Kernel, root_pid: int) -> list[Problem]:
    # A list: the guard ends when a generator has been made.
    tree = tree_of(source, root_pid)
    if not tree or tree[0][0] == 1:
        return []  # a pid namespace of its own comes along
    ns = task_active_pid_ns(tree[0][1])
    tids = (tid for _, task in tree for tid in settled(partial(_tids, task, ns)))
    taken = ((tid, task) for tid in tids if (task := find_task(destination, tid)))
    found = [
        Problem(
            f"pid {tid} is taken in the destination by {task.comm!r}",
            "end that process there; a tree keeps its pids",
        )
        for tid, task in islice(taken, _SHOWN)
    ]
    if more := sum(1 for _ in taken):
        found.append(
            Problem(
                f"{more} more pids are taken there",
                "move the tree to a VM that has just been booted",
            )
        )
    return found


def _tids(task: Struct, ns: Struct) -> list[int]:
    return [pid_nr_ns(one.thread_pid, ns) for one in for_each_thread(task)]


def _of_container(agent: Agent, container: Container, id_: str) -> Iterator[Problem]:
    try:
        check_engine(agent.hello, container.engine)
    except CheckFailed as error:
        yield Problem(f"in the destination: {error}", error.hint)
        return
    for name in dict.fromkeys((container.name, id_)):
        if not agent.find(container.engine, name).status:
            yield Problem(
                f"the destination has a container {name[:12] if name == id_ else name}",
                f"podman rm {name}, in the destination",
            )
            return


def _of_cpu(source: Kernel, destination: Kernel) -> Iterator[Problem]:
    try:
        missing = _features(source) - _features(destination)
    except KernelNotFound:
        return  # built without the symbols of data: CRIU compares what it needs itself
    if missing:
        names = sorted(_name(source, one) for one in missing)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        yield Problem(
            f"the destination's CPU lacks {', '.join(names[:_SHOWN])}{more}",
            "start both VMs with the same -cpu; if the tree uses none of them, give --ignore-cpu",
        )


@types_that_fit()
def _features(kernel: Kernel) -> set[int]:
    data: Any = kernel.object("struct cpuinfo_x86", kernel.symbol("boot_cpu_data"))
    words = data.x86_capability
    return {
        32 * word + bit for word in _HARDWARE_WORDS for bit in range(32) if words[word] >> bit & 1
    }


def _name(kernel: Kernel, feature: int) -> str:
    try:
        names = kernel.pointer("unsigned long", kernel.symbol("x86_cap_flags"))
        text = kernel.space.read(Gva(names[feature]), 16).partition(b"\0")[0].decode("ascii")
    except (KernelNotFound, LookupError, UnicodeDecodeError):
        text = ""
    return text or f"feature {feature // 32}:{feature % 32}"
