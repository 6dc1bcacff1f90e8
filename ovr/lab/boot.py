"""Booting lab VMs, from a name and a size to an agent that answers."""

import logging
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ovr.errors import AgentUnreachable, LabError
from ovr.guest import build as build_agent
from ovr.lab.accel import Accel, choose
from ovr.lab.cache import cache_directory
from ovr.lab.image import GuestImage, guest_image
from ovr.lab.machine import LabVm, claimed
from ovr.lab.process import Process, last_line
from ovr.lab.qemu import (
    READY,
    Backend,
    Hardware,
    boot_arguments,
    machine_arguments,
    service_arguments,
)
from ovr.lab.ram import make_ram, memory_size
from ovr.lab.share import add_share, share_device
from ovr.lab.trial import boots_under_kvm
from ovr.lab.vsock import add_vsock

__all__ = ["GuestDied", "up"]

_TCG_ATTEMPTS = 3
_log = logging.getLogger(__name__)


class GuestDied(LabError):
    """The guest crashed while it booted."""


def up(
    name: str,
    *,
    suite: str = "trixie",
    memory: str | int = "4G",
    cpus: int = 2,
    accel: Accel = "auto",
    la57: bool | None = None,
    numa: int = 1,
    share: Path | None = None,
    packages: Sequence[str] = (),
    kernel: str = "",
    append: str = "",
    backend: Backend = "file",
    patience: float = 180.0,
) -> LabVm:
    """Boot a VM and return once its agent answers.

    Args:
        name: unique among this user's lab VMs.
        suite: Debian suite, one of `ovr.lab.image.SUITES`.
        memory: bytes of RAM, or a text like ``4G``.
        cpus: number of virtual CPUs.
        accel: the accelerator; ``auto`` uses KVM if a guest boots with it.
        la57: with or without 5-level paging; None is the CPU model's default.
        numa: number of NUMA nodes, each with an equal part of the RAM in its own file.
        share: directory of the host that is mounted in the guest at `ovr.lab.share.SHARE`.
        packages: additional Debian packages for the guest.
        kernel: package with the kernel, of the suite or ``PACKAGE/RELEASE``; default: the suite's
            cloud kernel.
        append: words for the kernel's command line, such as ``nokaslr``.
        backend: the kind of RAM, one of `ovr.lab.qemu.BACKENDS`.
        patience: seconds that the guest may take to boot.

    Raises:
        LabError: the name is taken, memory is short, a tool of the host is missing, a download
            failed, or the guest does not boot.
    """
    size = memory_size(memory, numa, backend)
    image = guest_image(suite, packages, kernel)
    program = image.initramfs(build_agent(lab=True))
    engine = choose(accel, lambda: boots_under_kvm(image, program))
    hardware = Hardware(size, cpus, engine, la57, numa, backend, append)
    for _ in range(_TCG_ATTEMPTS - 1 if engine == "tcg" else 0):
        try:
            return _boot(name, image, program, hardware, share, patience=patience)
        except GuestDied as error:
            # Under load, TCG may run code that the guest's kernel has just patched on another
            # vCPU (static keys): an unexpected int3. Seen about once in a hundred boots.
            _log.warning("%s; trying again", error)
    return _boot(name, image, program, hardware, share, patience=patience)


def _boot(
    name: str,
    image: GuestImage,
    program: bytes,
    hardware: Hardware,
    share: Path | None,
    *,
    patience: float,
) -> LabVm:
    with claimed(name) as directory:
        ram = make_ram(directory, hardware.memory, hardware.numa, hardware.backend)
        vm = LabVm(
            name, image.suite, hardware, directory / "qmp", "", f"serial:{directory / 'serial'}",
            directory / "console.log", ram,
        )  # fmt: skip
        with _down_on_failure(vm):
            (directory / "initramfs").write_bytes(program)
            _start(vm, image, share)
    with _down_on_failure(vm):
        _await_agent(vm, time.monotonic() + patience)
    return vm


@contextmanager
def _down_on_failure(vm: LabVm) -> Iterator[None]:
    try:
        yield
    except BaseException:
        vm.down()
        raise


def _start(vm: LabVm, image: GuestImage, share: Path | None) -> None:
    # The state is saved after each process, so that `down` finds it after any failure.
    directory = vm.console.parent
    devices: list[str] = []
    vm.save()
    vsock = add_vsock(directory)
    vm.agent = vsock.address
    devices += vsock.arguments
    if vsock.daemon:
        vm.processes["vsock"] = vsock.daemon
        vm.save()
    if share is not None:
        vm.processes["virtiofsd"] = add_share(share, directory)
        vm.save()
        devices += share_device(directory)
    command = [
        *machine_arguments(vm.hardware, vm.ram),
        *boot_arguments(
            image, directory / "initramfs", vm.name, f"file,path={vm.console}", vm.hardware.append
        ),
        *service_arguments(directory),
        *devices,
    ]
    vm.processes["qemu"] = _launch(command, directory)
    vm.save()


def _launch(command: Sequence[str], directory: Path) -> Process:
    # With -daemonize, QEMU returns when the machine is ready, and reports errors until then.
    pidfile = directory / "qemu.pid"
    done = subprocess.run(
        [*command, "-daemonize", "-pidfile", str(pidfile)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "warning:" not in line]
        raise LabError(f"QEMU does not start: {(lines or ['no message'])[0]}")
    return Process.find(int(pidfile.read_text()))


def _await_agent(vm: LabVm, deadline: float) -> None:
    trouble = "no word of our init"
    while time.monotonic() < deadline:
        if not vm.alive:
            raise _not_up(GuestDied, vm, "died")
        if READY in vm.console.read_bytes():
            try:
                with vm.connect(timeout=5) as agent:
                    agent.run(["true"], timeout=5)
                return
            except (AgentUnreachable, LabError) as error:  # a loaded host takes longer
                trouble = str(error)
        time.sleep(0.1)
    raise _not_up(LabError, vm, f"does not come up ({trouble})")


def _not_up(kind: type[LabError], vm: LabVm, what: str) -> LabError:
    kept = cache_directory() / f"failed-{vm.name}.log"
    shutil.copyfile(vm.console, kept)
    return kind(
        f"lab VM {vm.name} {what}: {last_line(vm.console)}", f"its console log is kept in {kept}"
    )
