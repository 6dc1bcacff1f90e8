"""A running VM with everything that is needed to look at it and to write to it from outside."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from ovr.kernel import Kernel
from ovr.ram import GuestRam
from ovr.vm.find import VmAddress, find_vm
from ovr.vm.memory_map import guest_slots

__all__ = ["AttachedVm"]


class AttachedVm:
    """QMP, guest RAM and the guest's kernel; a context manager.

    Args:
        spec: ``libvirt:DOMAIN``, ``name:NAME``, ``qmp:PATH``, ``pid:N`` or ``lab:NAME``.
        writable: map guest RAM for writing.
        vmlinux: the guest kernel's file, where its memory does not say enough.

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
            self.ram = stack.enter_context(GuestRam(guest_slots(self.qmp), writable=writable))
            self.kernel = Kernel.find(self.ram, vmlinux)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the VM; it runs on."""
        self._stack.close()
