"""Lab VMs: boot one, find it again, talk to it, end it without a trace.

A VM outlives the command that started it. All that belongs to it is in one directory: state
file, sockets, console log, the mount with its RAM; its processes are in the state file.
"""

import fcntl
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ovr.errors import AgentUnreachable, LabError
from ovr.guest import build as build_agent
from ovr.lab.accel import Accel, choose
from ovr.lab.cache import cache_directory
from ovr.lab.image import GuestImage, guest_image
from ovr.lab.process import Process, last_line
from ovr.lab.qemu import (
    READY,
    Hardware,
    boot_arguments,
    machine_arguments,
    service_arguments,
)
from ovr.lab.ram import drop_ram, make_ram, memory_size
from ovr.lab.share import add_share, share_device
from ovr.lab.trial import boots_under_kvm
from ovr.lab.vsock import add_vsock
from ovr.vm.agent import Agent, Completed
from ovr.vm.find import LAB_STATE, lab_directory

__all__ = ["LabVm", "get", "ls", "up"]


@dataclass
class LabVm:
    """A VM of the lab.

    Attributes:
        name: its name, unique among this user's lab VMs.
        suite: the Debian suite it runs.
        hardware: what it is made of.
        qmp: path of its QMP socket.
        agent: address of its agent over vsock.
        serial: address of its agent over virtio-serial.
        console: the log of its serial console.
        ram: its RAM files, one a NUMA node.
        processes: what runs for it on the host; ``qemu`` is the VM itself.
    """

    name: str
    suite: str
    hardware: Hardware
    qmp: Path
    agent: str
    serial: str
    console: Path
    ram: tuple[Path, ...]
    processes: dict[str, Process] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        """QEMU's pid."""
        return self.processes["qemu"].pid

    @property
    def alive(self) -> bool:
        """Whether its QEMU runs."""
        return "qemu" in self.processes and self.processes["qemu"].alive

    def connect(self, timeout: float = 30.0) -> Agent:
        """Connect to the guest's agent over vsock. Raises `AgentUnreachable`."""
        return Agent.connect(self.agent, timeout=timeout)

    def sh(self, command: str, *, input: bytes = b"", timeout: float = 60.0) -> Completed:
        """Run a shell command in the guest and return its status and output."""
        with self.connect() as agent:
            return agent.run(["/bin/sh", "-c", command], input=input, timeout=timeout)

    def put(self, local: Path, remote: str, mode: int = 0o644) -> None:
        """Copy a file into the guest."""
        with self.connect() as agent:
            agent.put(local, remote, mode)

    def get(self, remote: str, local: Path) -> None:
        """Copy a file out of the guest."""
        with self.connect() as agent:
            agent.get(remote, local)

    def down(self) -> None:
        """End the VM and remove all that belongs to it. Nothing is asked of the guest."""
        for process in reversed(self.processes.values()):  # QEMU was started last
            process.end()
        _clear(lab_directory(self.name))

    def save(self) -> None:
        """Write the state file."""
        path = lab_directory(self.name) / LAB_STATE
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self), default=str, indent=1) + "\n")
        fresh.rename(path)


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
    patience: float = 180.0,
) -> LabVm:
    """Boot a VM and return once its agent answers.

    Args:
        name: unique among this user's lab VMs.
        suite: Debian suite, one of `ovr.lab.image.SUITES`.
        memory: bytes of RAM, or a text like ``4G``.
        cpus: number of virtual CPUs.
        accel: what runs them; ``auto`` takes KVM where a guest boots with it.
        la57: with or without 5-level paging; None takes what the CPU model has.
        numa: number of NUMA nodes, each with an equal part of the RAM in its own file.
        share: directory of the host that the guest sees at `ovr.lab.share.SHARE`.
        packages: Debian packages that the guest has besides the usual.
        patience: seconds that the guest may take to boot.

    Raises:
        LabError: the name is taken, memory is short, a tool of the host is missing, a download
            failed, or the guest does not come up.
    """
    size = memory_size(memory, numa)
    image = guest_image(suite, packages)
    program = image.initramfs(build_agent(lab=True))
    engine = choose(accel, lambda: boots_under_kvm(image, program))
    hardware = Hardware(size, cpus, engine, la57, numa)
    with _claimed(name) as directory:
        ram = make_ram(directory, size, numa)
        vm = LabVm(
            name, suite, hardware, directory / "qmp", "", f"serial:{directory / 'serial'}",
            directory / "console.log", ram,
        )  # fmt: skip
        with _down_on_failure(vm):
            (directory / "initramfs").write_bytes(program)
            _start(vm, image, share)
    with _down_on_failure(vm):
        _await_agent(vm, time.monotonic() + patience)
    return vm


def get(name: str) -> LabVm:
    """Return a VM that runs, or ran until it crashed.

    Raises:
        LabError: there is no such VM.
    """
    if vm := _load(lab_directory(name) / LAB_STATE):
        return vm
    raise LabError(f"there is no lab VM {name}", f"ovr lab up {name}")


def ls() -> list[LabVm]:
    """Return this user's lab VMs by name, dead ones too: `LabVm.down` cleans up after them."""
    found = map(_load, sorted(lab_directory().glob(f"*/{LAB_STATE}")))
    return [vm for vm in found if vm]


@contextmanager
def _claimed(name: str) -> Iterator[Path]:
    # The VM's new, empty directory, held against other commands; a dead VM's is cleaned up.
    directory = lab_directory(name)
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (directory.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if old := _load(directory / LAB_STATE):
            if old.alive:
                raise LabError(f"lab VM {name} runs already", f"ovr lab down {name}")
            old.down()
        _clear(directory)
        directory.mkdir(mode=0o700)
        try:
            yield directory
        except BaseException:
            _clear(directory)
            raise


def _clear(directory: Path) -> None:
    drop_ram(directory)
    shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _down_on_failure(vm: LabVm) -> Iterator[None]:
    try:
        yield
    except BaseException:
        vm.down()
        raise


def _start(vm: LabVm, image: GuestImage, share: Path | None) -> None:
    # The state is saved after each process, so that whatever happens, `down` finds it.
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
        *boot_arguments(image, directory / "initramfs", vm.name, f"file,path={vm.console}"),
        *service_arguments(directory),
        *devices,
    ]
    vm.processes["qemu"] = _launch(command, directory)
    vm.save()


def _launch(command: Sequence[str], directory: Path) -> Process:
    # With -daemonize QEMU returns when the machine stands, and reports errors until then.
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
            raise _not_up(vm, "died")
        if READY in vm.console.read_bytes():
            try:
                with vm.connect(timeout=5) as agent:
                    agent.run(["true"], timeout=5)
                return
            except AgentUnreachable as error:
                trouble = str(error)
        time.sleep(0.1)
    raise _not_up(vm, f"does not come up ({trouble})")


def _not_up(vm: LabVm, what: str) -> LabError:
    kept = cache_directory() / f"failed-{vm.name}.log"
    shutil.copyfile(vm.console, kept)
    return LabError(
        f"lab VM {vm.name} {what}: {last_line(vm.console)}", f"its console log is kept in {kept}"
    )


def _load(path: Path) -> LabVm | None:
    try:
        state = json.loads(path.read_bytes())
        return LabVm(
            name=str(state["name"]),
            suite=str(state["suite"]),
            hardware=Hardware(**state["hardware"]),
            qmp=Path(state["qmp"]),
            agent=str(state["agent"]),
            serial=str(state["serial"]),
            console=Path(state["console"]),
            ram=tuple(Path(part) for part in state["ram"]),
            processes={key: Process(**value) for key, value in state["processes"].items()},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LabError(f"the lab's state file {path} is damaged: {error}") from error
