"""The vCPUs and tasks of a guest that does not answer, seen from outside."""

import bisect
import re
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial

from ovr.errors import OvrError
from ovr.kernel.kernel import Kernel
from ovr.kernel.linux.tasks import (
    for_each_process,
    for_each_thread,
    is_kernel_thread,
    task_comm,
    task_state,
)
from ovr.lab import LabVm
from ovr.memory.addresses import Gva
from ovr.vm.attach import AttachedVm
from ovr.vm.qmp import Monitor

__all__ = ["doings"]

_STACK = 16 << 10  # THREAD_SIZE, arch/x86/include/asm/page_64_types.h
_DEPTH = 14
_REGISTERS = re.compile(r"^(?:CPU#\d+)|\bRIP=\w+|\bHLT=\d", re.M)
_RIP = re.compile(r"RIP=(\w+)")
_WAITING = re.compile(r"^(?:IRR|ISR).*", re.M)


def doings(vm: LabVm) -> str:
    """Return where the vCPUs are, twice, what interrupts wait, and the stacks of tasks.

    Kernel threads that sleep are left out. A VM that cannot be looked at says why.
    """
    try:
        with AttachedVm(f"lab:{vm.name}") as attached:
            name = partial(_name, *_sorted(attached.kernel))
            lines = [*_vcpus(attached.qmp, name, vm.hardware.cpus)]
            time.sleep(1)
            lines += [*_vcpus(attached.qmp, name, vm.hardware.cpus), *_tasks(attached.kernel, name)]
    except (OvrError, OSError) as error:
        return f"({error})"
    return "\n".join(lines)


def _vcpus(qmp: Monitor, name: Callable[[int], str | None], count: int) -> Iterator[str]:
    def ask(command: str) -> str:
        said = qmp.execute("human-monitor-command", **{"command-line": command})
        return str(said).replace("\r", "")

    registers = ask("info registers -a")
    yield " ".join(_REGISTERS.findall(registers))
    places = [int(word, 16) for word in _RIP.findall(registers)]
    yield " | ".join(name(place) or "in user space, or a module" for place in places)
    for cpu in range(count):
        yield f"CPU#{cpu} {' '.join(_WAITING.findall(ask(f'info lapic {cpu}')))}"


def _sorted(kernel: Kernel) -> tuple[list[int], list[str]]:
    symbols = sorted((int(address), name) for name, address in kernel.symbols)
    return [address for address, _ in symbols], [name for _, name in symbols]


def _name(addresses: list[int], names: list[str], address: int) -> str | None:
    at = bisect.bisect_right(addresses, address) - 1
    # Text only: a kernel's text is some 20 MiB, and modules have no symbols here.
    if at < 0 or address - addresses[at] > 1 << 16 or address >> 31 != (1 << 33) - 1:
        return None
    return f"{names[at]}+{address - addresses[at]:#x}"


def _tasks(kernel: Kernel, name: Callable[[int], str | None]) -> Iterator[str]:
    for leader in for_each_process(kernel):
        for task in for_each_thread(leader):
            state = task_state(task)
            if not (is_kernel_thread(task) and state in "SI"):
                frames = " < ".join([*_frames(kernel, task, name)][:_DEPTH])
                yield f"{int(task.pid)} {state} {task_comm(task)}: {frames}"


def _frames(kernel: Kernel, task, name: Callable[[int], str | None]) -> Iterator[str]:
    # As a debugger without unwind tables does it: all that could be a return address. What is below
    # the stack pointer of a task that runs is not known, so all of its stack is.
    base = int(task.stack)
    pointer = int(task.thread.sp)
    start = pointer if base <= pointer < base + _STACK else base
    try:
        data = kernel.space.read(Gva(start), base + _STACK - start)
    except OvrError:
        return
    for (word,) in struct.iter_unpack("<Q", data[: len(data) // 8 * 8]):
        found = name(word)
        if found and not found.endswith("+0x0"):
            yield found
