"""Lab VMs: find, use, and end them with all that belongs to them. `ovr.lab.boot` starts them.

A VM outlives the command that started it. Its files are in a single directory: state file, sockets,
console log, the mount with its RAM; its processes are listed in the state file.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ovr.errors import LabError
from ovr.host import Directory
from ovr.lab.agent import Completed, LabAgent
from ovr.lab.process import Process
from ovr.lab.qemu import Hardware
from ovr.lab.ram import drop_ram
from ovr.vm.find import LAB_STATE, lab_directory

__all__ = ["LabVm", "claimed", "get", "ls"]


@dataclass
class LabVm:
    """A VM of the lab.

    Attributes:
        name: its name, unique among this user's lab VMs.
        suite: the Debian suite it runs.
        hardware: its CPUs, RAM and devices.
        qmp: path of its QMP socket.
        agent: address of its agent over vsock.
        serial: address of its agent over virtio-serial.
        console: the log of its serial console.
        ram: its RAM files, one for each NUMA node; memfds have no path.
        processes: its processes on the host; ``qemu`` is the VM itself.
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

    def connect(self, timeout: float = 30.0) -> LabAgent:
        """Connect to the guest's agent over vsock. Raises `AgentUnreachable`."""
        return LabAgent.connect(self.agent, timeout=timeout)

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
        """End the VM, without a shutdown of the guest, and remove all that belongs to it."""
        for process in reversed(self.processes.values()):  # QEMU was started last
            process.end()
        _clear(lab_directory(self.name))

    def save(self) -> None:
        """Write the state file."""
        path = lab_directory(self.name) / LAB_STATE
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self), default=str, indent=1) + "\n")
        fresh.rename(path)


def get(name: str) -> LabVm:
    """Return a VM that runs, or has crashed.

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
def claimed(name: str) -> Iterator[Path]:
    """Make the empty directory of a new VM, locked against other commands; remove it on an error.

    A dead VM of that name is cleaned up.

    Raises:
        LabError: the name is taken.
    """
    directory = lab_directory(name)
    with (
        Directory.private(directory.parent, create=True) as place,
        os.fdopen(place.overwrite(".lock", 0o600), "w") as lock,
    ):
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
