"""One `ovr` at a time restores into a VM: a lock on the VM's own RAM file.

All who restore into a VM open that file, whatever their user, container or mount namespace, and
the kernel keeps the lock (``flock``) with the file itself. It ends with the process that has it,
however that ends, and nothing is left behind. QEMU and its helpers lock no RAM files.
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
        CheckFailed: another one is at it, or the file's file system knows no locks.
        RamNotShared: we may not read the RAM file.
    """
    file = min(slots, key=lambda slot: slot.gpa).file
    # A lock belongs to the open file description, and the one that we map may be QEMU's.
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
    """Say so if another `ovr` has the VM; for when QEMU's monitor, which serves one, is silent.

    Args:
        qemu_pid: QEMU, one of whose open files is its RAM. Nothing happens if we may not look.

    Raises:
        CheckFailed: another one is at it.
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
    # Who has which file locked, 0 for a pid that has no number here. A line of /proc/locks is
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
