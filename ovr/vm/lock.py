"""The lock of a VM, on its RAM file: a single `ovr` at a time restores into it.

Every `ovr` that restores into a VM opens that file, in any container or mount namespace and as any
user, and the kernel keeps the lock (``flock``) with the file itself. It ends with its process and
leaves nothing behind. QEMU and its helpers lock no RAM files.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ovr.errors import CheckFailed
from ovr.memory.ram import Slot

__all__ = ["locked", "refuse_locked"]


@contextmanager
def locked(slots: Sequence[Slot]) -> Iterator[None]:
    """Keep other `ovr` processes from restoring into the VM for the body of the ``with``.

    Args:
        slots: the VM's RAM.

    Raises:
        CheckFailed: another one has the lock, or the file system has no locks.
        RamNotShared: we may not read the RAM file.
    """
    file = min(slots, key=lambda slot: slot.gpa).file
    # A lock belongs to the open file description, and the mapped one may be QEMU's.
    fd = file.reopened()
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _taken(_locks().get(_name(os.fstat(fd)), 0)) from error
        except OSError as error:
            raise CheckFailed(
                f"the VM's RAM file {file.name} cannot be locked: {error.strerror}",
                "keep it on a file system with locks (flock), such as tmpfs",
            ) from error
        yield
    finally:
        os.close(fd)


def refuse_locked(qemu_pid: int) -> None:
    """Report another `ovr` that uses the VM, when QEMU's monitor, with its one client, is silent.

    Args:
        qemu_pid: QEMU, whose open files include its RAM. Does nothing if they cannot be read.

    Raises:
        CheckFailed: another one has the lock.
    """
    locks = _locks()
    with suppress(OSError):
        for path in Path(f"/proc/{qemu_pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                owner = locks.get(_name(path.stat()))
                if owner is not None:
                    raise _taken(owner)


def _taken(owner: int) -> CheckFailed:
    who = f"process {owner}" if owner else "a process that cannot be seen from here"
    look = f"ps -p {owner} shows it; " if owner else ""
    return CheckFailed(
        f"another ovr restores into this VM: {who}",
        f"{look}wait until it has ended, and restore again",
    )


def _locks() -> dict[str, int]:
    # Locked files and the pids of the owners; 0 outside of our pid namespace. /proc/locks has lines
    # "1: FLOCK  ADVISORY  WRITE 4242 00:19:1234 0 EOF"; the device is in hexadecimal (fs/locks.c).
    try:
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return {}
    held = (words for words in lines if len(words) >= 6 and words[1] == "FLOCK")
    return {words[5]: max(int(words[4]), 0) for words in held}


def _name(status: os.stat_result) -> str:
    device = status.st_dev
    return f"{os.major(device):02x}:{os.minor(device):02x}:{status.st_ino}"
