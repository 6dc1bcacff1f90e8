"""Read the secret by which host and agent authenticate each other from the agent's memory.

The program at the agent's address names its process and the page with the secret. Neither is
trusted: the page is accepted only if no user of the guest can have made it.

* The process is root of the whole guest (`ovr.kernel.why_not_root`): with fewer privileges a user
  could run it, at least in a user namespace.
* It was not started by a set-uid program or the like (``AT_SECURE``): its memory, such as arguments
  and environment, could contain data of a user.
* The page is a private anonymous mapping of one page, locked, and excluded from children and core
  dumps. Data that a root process reads from other users, or gets from its parent, is in a stack, a
  heap, a buffer or a mapped file, never in such a mapping.
* Its first bytes contain its own address, and pid and start time of its process: bytes copied from
  another page would not match.

All conditions are checked in one hold, so nothing changes in between. `proof.c` makes the page.
"""

import struct
from dataclasses import dataclass, field
from typing import Any, Final

from ovr._fastcopy import OWNED
from ovr.errors import GuestFault
from ovr.guest import protocol
from ovr.kernel import (
    Kernel,
    Struct,
    find_task,
    find_vma,
    mm_space,
    types_that_fit,
    why_not_root,
)
from ovr.memory.addresses import PAGE_SIZE, Gpa, Gva
from ovr.memory.paging import pieces

__all__ = ["AgentProcess", "NotTheAgent", "read_secret"]

_PAGE: Final = struct.Struct("<16sQQQ32s")
_AT_SECURE: Final = 23  # include/uapi/linux/auxvec.h
_TICK: Final = 10_000_000
"""Nanoseconds of a clock tick as /proc counts them: nsec_to_clock_t(), USER_HZ."""

# include/linux/mm.h
_VM_SHARED: Final = 0x8
_VM_LOCKED: Final = 0x2000
_VM_DONTCOPY: Final = 0x2_0000
_VM_WIPEONFORK: Final = 0x200_0000
_VM_DONTDUMP: Final = 0x400_0000
_VM_SET: Final = _VM_LOCKED | _VM_DONTCOPY | _VM_WIPEONFORK | _VM_DONTDUMP


@dataclass(frozen=True)
class AgentProcess:
    """The agent in the guest.

    Attributes:
        pid: in the guest's initial pid namespace.
        task: its ``struct task_struct``.
        program: the ``struct inode`` of its program file.
        secret: the secret in its page.
    """

    pid: int
    task: Gva
    program: Gva
    secret: bytes = field(repr=False)


class NotTheAgent(Exception):
    """The process or the page is not the agent's.

    Attributes:
        code: the condition that failed: ``process``, ``credentials`` or ``secret``.
    """

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code


@types_that_fit()
def read_secret(kernel: Kernel, pid: int, address: int) -> AgentProcess:
    """Return the agent's process and secret. To be called in a hold.

    Args:
        kernel: the guest's kernel.
        pid: the alleged pid of the agent, in the guest's initial pid namespace.
        address: the alleged GVA of the page in that process.

    Raises:
        NotTheAgent: it is not the agent's, or may be another process's.
        GuestFault: invalid kernel objects; or the page is being moved, and will be mapped again in
            a later hold.
        KernelNotFound: the kernel's types do not fit.
    """
    task = find_task(kernel, pid)
    if task is None or task.tgid != task.pid or not task.mm:
        raise NotTheAgent("process", f"the guest has no process {pid}")
    reason = why_not_root(kernel, task)
    if not reason and _is_secure(task.mm):
        reason = "it was started by a program that raises privileges"
    if reason:
        raise NotTheAgent("credentials", f"pid {pid}: {reason}")
    where = f"pid {pid} has no page with the agent's secret at {address:#x}"
    if address % PAGE_SIZE or not 0 < address < 1 << 56 or not _is_by_itself(task.mm, Gva(address)):
        raise NotTheAgent("secret", where)
    magic, own_address, own_pid, start, secret = _PAGE.unpack(
        _content(kernel, task.mm, Gva(address))
    )
    name = (protocol.SECRET_MAGIC, address, pid, task.start_boottime // _TICK)
    if (magic, own_address, own_pid, start) != name:
        raise NotTheAgent("secret", where)
    program = Gva(task.mm.exe_file.f_inode.address_)
    return AgentProcess(pid, Gva(task.address_), program, secret)


def _is_secure(mm: Struct) -> bool:
    # The auxiliary vector that the kernel gave the process: begin_new_exec(), bprm->secureexec.
    words: Any = mm.saved_auxv
    keys = (words[number] for number in range(0, len(words) - 1, 2))
    found = [words[2 * at + 1] for at, key in enumerate(keys) if key == _AT_SECURE]
    return found != [0]


def _is_by_itself(mm: Struct, address: Gva) -> bool:
    vma = find_vma(mm, address)
    if vma is None or (vma.vm_start, vma.vm_end) != (address, address + PAGE_SIZE):
        return False
    flags: int = vma.vm_flags
    anonymous = not vma.vm_ops and not vma.vm_file and not flags & _VM_SHARED
    return anonymous and flags & _VM_SET == _VM_SET


def _content(kernel: Kernel, mm: Struct, address: Gva) -> bytes:
    # Only from a page that the kernel marks as exclusively owned by this process.
    space = mm_space(kernel, mm)
    runs = space.walk(pieces([(address, PAGE_SIZE, 0)]), kernel.private_frames).tolist()
    if len(runs) != 1 or not runs[0][4] & OWNED:
        raise GuestFault(f"the agent's page at {address:#x} is not mapped, or shared", address)
    return kernel.ram.read(Gpa(runs[0][1]), _PAGE.size)
