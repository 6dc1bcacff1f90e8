"""All VMs of this host: their names for ``--vm``, and whether they can be restored into."""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from ovr.errors import CheckFailed, OvrError
from ovr.vm.blockers import blockers
from ovr.vm.find import VmAddress, address_of_process, find_vm, lab_addresses
from ovr.vm.memory_map import guest_slots
from ovr.vm.processes import QemuProcess, qemu_processes

__all__ = ["FoundVm", "found_vms"]

_PATIENCE = 3.0  # seconds for each answer: a stuck VM must not hide the others


@dataclass(frozen=True)
class FoundVm:
    """A VM of this host.

    Attributes:
        pid: QEMU's pid.
        name: its name in QEMU or libvirt, if it has one.
        names: its names for ``--vm``, the best first.
        agent: the address that its agent would have, if known; it is not contacted.
        state: QEMU's run state (``running``, ``paused``, …), None if it did not answer.
        memory: bytes of RAM that can be reached from outside; None if none can.
        problem: the reason why it cannot be restored into, as far as it shows without a look into
            the guest; else None.
    """

    pid: int
    name: str | None
    names: tuple[str, ...]
    agent: str | None
    state: str | None = None
    memory: int | None = None
    problem: OvrError | None = None


def found_vms() -> list[FoundVm]:
    """Return every VM of this host, also those of other users, by pid."""
    labs = lab_addresses()
    processes = qemu_processes()
    return [_look(process, labs, processes) for process in processes]


def _look(
    process: QemuProcess, labs: Sequence[VmAddress], processes: Sequence[QemuProcess]
) -> FoundVm:
    names = tuple(_names(process, labs, processes))
    agent, state, memory = process.agent, None, None
    problem: OvrError | None = None
    try:
        address = _address(names[0], process)
        agent = address.agent or agent
        with closing(address.connect(_PATIENCE)) as qmp:
            state = qmp.status()
            memory = sum(slot.size for slot in guest_slots(qmp))
            problem = next(iter(blockers(qmp)), None)
        if problem is None and state != "running":
            problem = CheckFailed(f"the VM is {state}", "resume it (QMP cont, virsh resume)")
    except OvrError as error:
        problem = error
    return FoundVm(process.pid, process.name, names, agent, state, memory, problem)


def _names(
    process: QemuProcess, labs: Sequence[VmAddress], processes: Sequence[QemuProcess]
) -> Iterator[str]:
    if process.libvirt and process.name:
        yield f"libvirt:{process.name}"
        return  # its only monitor is libvirt's
    sockets = process.qmp
    if process.uid == os.geteuid():  # the owner sets the name: another user's proves nothing
        yield from (lab.spec for lab in labs if lab.qmp in sockets)
        own = [other.name for other in processes if other.uid == process.uid]
        if process.name and own.count(process.name) == 1:
            yield f"name:{process.name}"
    yield from (f"qmp:{path}" for path in sockets)
    yield f"pid:{process.pid}"


def _address(name: str, process: QemuProcess) -> VmAddress:
    if name.startswith(("libvirt:", "lab:")):
        return replace(find_vm(name), pid=process.pid)
    return address_of_process(name, process)
