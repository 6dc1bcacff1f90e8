"""The QEMU command line of a lab VM."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from ovr.lab.accel import Engine, cpu_model, qemu_program
from ovr.lab.image import GuestImage

__all__ = [
    "BACKENDS",
    "READY",
    "Backend",
    "Hardware",
    "boot_arguments",
    "machine_arguments",
    "service_arguments",
]

Backend = Literal["file", "memfd", "hugetlbfs"]
BACKENDS: Final[tuple[Backend, ...]] = ("file", "memfd", "hugetlbfs")
"""Kinds of RAM: files in a tmpfs, memfds, files in a hugetlbfs."""

READY = b"ovr-init: ready"
"""The line that our init writes to the console when the guest is up."""


@dataclass(frozen=True)
class Hardware:
    """CPUs, RAM and kernel options of a VM.

    Attributes:
        memory: bytes of RAM.
        cpus: number of virtual CPUs.
        engine: the accelerator.
        la57: with or without 5-level paging; None is the CPU model's default.
        numa: number of NUMA nodes; each gets an equal part of the RAM, in a file of its own.
        backend: one of `BACKENDS`.
        append: words for the kernel's command line.
    """

    memory: int
    cpus: int
    engine: Engine
    la57: bool | None
    numa: int
    backend: Backend = "file"
    append: str = ""


def boot_arguments(
    image: GuestImage, initramfs: Path, hostname: str, console: str, append: str = ""
) -> list[str]:
    """Return the options that boot the image: kernel, disk with a temporary overlay, console.

    Args:
        image: the guest image; not written to.
        initramfs: see `ovr.lab.initramfs`.
        hostname: of the guest.
        console: a QEMU chardev specification without its id, such as ``stdio``.
        append: further words for the kernel's command line.
    """
    # QEMU ends when the guest crashes, so that no command waits for it. No clocksource watchdog: in
    # Linux 7.2 it waits for another CPU with interrupts off (`watchdog_check_skew`), for ever if
    # that one is in `stop_machine`, which a slow vCPU makes likely; QEMU's TSCs are stable.
    options = f"console=ttyS0 oops=panic panic=-1 tsc=nowatchdog hostname={hostname}"
    more: list[str] = []
    if image.kernel.disk:
        options += " module_disk=/dev/vdb"  # for our init
        drive = f"if=none,id=modules,format=raw,readonly=on,file={image.kernel.disk}"
        more += ["-drive", drive, "-device", "virtio-blk-pci,drive=modules"]
    return [
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-kernel", str(image.kernel.vmlinuz), "-initrd", str(initramfs),
        "-append", f"{options} {append}".strip(),
        "-drive", f"if=none,id=disk,format=raw,snapshot=on,file={image.disk}",
        "-device", "virtio-blk-pci,drive=disk", *more,
        "-device", "virtio-rng-pci",
        "-chardev", f"{console},id=console", "-serial", "chardev:console",
    ]  # fmt: skip


def machine_arguments(hardware: Hardware, ram: Sequence[Path]) -> list[str]:
    """Return QEMU's path and the options of the machine: CPUs, and RAM in shared files.

    Args:
        hardware: the machine.
        ram: a file for each NUMA node; none for memfds.
    """
    return [
        qemu_program(),
        "-accel", "kvm" if hardware.engine == "kvm" else "tcg,thread=multi,tb-size=256",
        "-cpu", cpu_model(hardware.engine, hardware.la57),
        "-smp", str(hardware.cpus), "-m", f"size={hardware.memory}B",
        *_ram_arguments(hardware, ram),
    ]  # fmt: skip


def service_arguments(directory: Path) -> list[str]:
    """Return the options for the host's access: QMP, the agent's serial port, QEMU's log."""
    return [
        "-qmp", f"unix:{directory / 'qmp'},server=on,wait=off",
        "-device", "virtio-serial-pci",
        "-chardev", f"socket,id=serial,path={directory / 'serial'},server=on,wait=off",
        "-device", "virtserialport,chardev=serial,name=org.ovr.0",
        "-D", str(directory / "qemu.log"),
    ]  # fmt: skip


def _ram_arguments(hardware: Hardware, ram: Sequence[Path]) -> Iterator[str]:
    part = hardware.memory // hardware.numa
    common = f"size={part}B,share=on,prealloc=on"
    for number in range(hardware.numa):
        yield "-object"
        if hardware.backend == "memfd":
            yield f"memory-backend-memfd,id=ram{number},{common}"
        else:
            yield f"memory-backend-file,id=ram{number},{common},mem-path={ram[number]},align=2M"
    if hardware.numa == 1:
        yield from ("-machine", "q35,memory-backend=ram0")
        return
    yield from ("-machine", "q35")
    for number in range(hardware.numa):
        yield from ("-numa", f"node,nodeid={number},memdev=ram{number}")
