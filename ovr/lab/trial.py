"""A test whether a lab guest boots under KVM on this host."""

import subprocess
import tempfile
import time
from pathlib import Path

from ovr.lab.image import GuestImage
from ovr.lab.qemu import READY, Hardware, boot_arguments, machine_arguments
from ovr.lab.ram import memory_size

__all__ = ["boots_under_kvm"]

_PATIENCE = 30.0  # seconds; TCG needs a third of that


def boots_under_kvm(image: GuestImage, initramfs: bytes) -> bool:
    """Boot the guest under KVM with little memory; tell whether our init completes."""
    with tempfile.TemporaryDirectory(prefix="ovr-kvm-", dir="/dev/shm") as name:
        directory = Path(name)
        archive, console = directory / "initramfs", directory / "console.log"
        archive.write_bytes(initramfs)
        hardware = Hardware(memory_size("512M"), 2, "kvm", None, 1)
        command = [
            *machine_arguments(hardware, [directory / "ram"]),
            *boot_arguments(image, archive, "trial", f"file,path={console}"),
        ]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as qemu:
            try:
                return _comes_up(qemu, console)
            finally:
                qemu.kill()


def _comes_up(qemu: "subprocess.Popen[bytes]", console: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and qemu.poll() is None:
        if console.exists() and READY in console.read_bytes():
            return True
        time.sleep(0.1)
    return False
