"""A running VM with everything that is needed to look at it and to write to it from outside."""

from contextlib import ExitStack
from pathlib import Path
from typing import Final

from ovr.errors import RestoreFailed
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
        vmlinux: the guest kernel's file, where its memory does not say enough.

    Attributes:
        address: where it is.
        qmp: a connection to QEMU.
        ram: its RAM.
        kernel: the kernel that ran when we attached.
        balloon: what the balloon left it then, in bytes; None without one, or not `writable`.

    Raises:
        UsageError: `spec` names no VM, or `vmlinux` is no such file.
        VmUnreachable: no VM there.
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
        """Make sure that the kernel that was found when we attached is the one that runs.

        Asked in every hold that writes, in tens of microseconds. QEMU announces a reset before any
        vCPU runs on: after it, the dead kernel lies in RAM as it was, for as long as nothing has
        overwritten it. Where no such announcement reaches us (libvirt), and for what comes without
        one (kexec, a snapshot that is loaded), the kernel's own mark of its boot tells, once that
        has changed.

        Raises:
            RestoreFailed: it is not.
            VmUnreachable: QEMU has ended.
        """
        if self.qmp.resets() != self._resets or not self.kernel.same_boot():
            raise RestoreFailed("the guest was rebooted since ovr attached to it", _BOOT_FIRST)

    def close(self) -> None:
        """Let go of the VM; it runs on."""
        self._stack.close()
