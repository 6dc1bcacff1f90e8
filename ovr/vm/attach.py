"""A running VM, attached to for reading and writing from outside."""

from contextlib import ExitStack
from pathlib import Path
from typing import Final

from ovr.errors import AttemptFailed
from ovr.host.closing import Closing
from ovr.kernel import Kernel
from ovr.memory.ram import GuestRam
from ovr.vm.blockers import balloon_size
from ovr.vm.find import VmAddress, find_vm
from ovr.vm.memory_map import guest_slots

__all__ = ["AttachedVm"]

_BOOT_FIRST: Final = "wait until it has booted, and restore again"


class AttachedVm(Closing):
    """QMP, guest RAM and the guest's kernel; a context manager.

    Args:
        spec: ``libvirt:DOMAIN``, ``name:NAME``, ``qmp:PATH``, ``pid:N`` or ``lab:NAME``.
        writable: map guest RAM for writing.
        vmlinux: the guest kernel's file, for symbols and types that are not in RAM.

    Attributes:
        address: its QMP socket and agent.
        qmp: a connection to QEMU.
        ram: its RAM.
        kernel: the kernel that ran at that time.
        balloon: bytes that the balloon left it then; None without one, or if not `writable`.

    Raises:
        UsageError: `spec` names no VM, or `vmlinux` is no such file.
        VmUnreachable: there is no such VM.
        CheckFailed: its RAM cannot be reached, or no known kernel runs in it.
    """

    def __init__(
        self, spec: str, *, writable: bool = False, vmlinux: str | Path | None = None
    ) -> None:
        self.address: VmAddress = find_vm(spec)
        with ExitStack() as stack:
            self.qmp = stack.enter_context(self.address.connect())
            self.balloon = balloon_size(self.qmp) if writable else None
            self.ram = stack.enter_context(GuestRam(guest_slots(self.qmp), writable=writable))
            self._resets = self.qmp.resets()
            self.kernel = Kernel.find(self.ram, vmlinux)
            stack.callback(self.kernel.close)
            self._stack = stack.pop_all()

    def check_same_boot(self) -> None:
        """Make sure that the kernel found at attach time still runs.

        Called in every hold that writes, and takes tens of microseconds. After a reset, the dead
        kernel stays in RAM until it is overwritten, but QEMU reports the reset before any vCPU
        runs on. Without such an event (under libvirt, after kexec or a loaded snapshot), a change
        of the kernel's boot mark shows it.

        Raises:
            AttemptFailed: it does not.
            VmUnreachable: QEMU has ended.
        """
        if self.qmp.resets() != self._resets or not self.kernel.same_boot():
            raise AttemptFailed("the guest was rebooted since ovr attached to it", _BOOT_FIRST)

    def close(self) -> None:
        """Release the VM; it runs on."""
        self._stack.close()
