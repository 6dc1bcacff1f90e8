"""Resolving the user's name of a VM to its QMP socket.

==================  ===============================================================
``libvirt:DOMAIN``  a libvirt domain, by name, UUID or id
``name:NAME``       a QEMU of the caller, started with ``-name NAME``
``qmp:PATH``        a QMP socket
``pid:N``           a QEMU process
``lab:NAME``        a VM of this repository's lab
==================  ===============================================================

The lab writes a state file for each VM, in the directory `lab_directory`. This module reads two of
its keys (``qmp`` and ``agent``) and knows nothing else of the lab; `ovr.lab` imports the location
of the files from here.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ovr.errors import LabError, UsageError, VmUnreachable
from ovr.host import Directory
from ovr.vm.libvirt import Domain, LibvirtMonitor, find_domain
from ovr.vm.processes import QemuProcess, qemu_process, qemu_processes
from ovr.vm.qmp import Monitor, Qmp

__all__ = [
    "LAB_STATE",
    "VM_FORMS",
    "VmAddress",
    "address_of_process",
    "find_vm",
    "lab_addresses",
    "lab_directory",
]

LAB_STATE = "vm.json"
"""The name of the state file in a lab VM's directory."""

VM_FORMS: Final = "libvirt:DOMAIN, name:NAME, qmp:PATH, pid:N or lab:NAME"
"""The forms that `find_vm` accepts, for messages."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_OWN_MONITOR = "give it one more monitor: -qmp unix:PATH,server=on,wait=off"


@dataclass(frozen=True)
class VmAddress:
    """The addresses of a VM.

    Attributes:
        spec: the name given by the user.
        qmp: path of the QMP socket, or the libvirt domain that has the monitor.
        agent: address of the guest's agent, in the form of ``--agent``, if known.
        pid: QEMU's, if the VM was named by its process; else None.
    """

    spec: str
    qmp: Path | Domain
    agent: str | None
    pid: int | None = None

    def connect(self, timeout: float = 10.0) -> Monitor:
        """Connect to the VM's monitor; `timeout` is for each answer, in seconds.

        Raises:
            VmUnreachable: it does not answer, or belongs to another process.
        """
        monitor: Monitor
        if isinstance(self.qmp, Domain):
            monitor = LibvirtMonitor(self.qmp, timeout)
        else:
            monitor = Qmp.connect(self.qmp, timeout)
        if self.pid not in (None, monitor.qemu_pid):
            with monitor:  # any user can put any path on a command line
                raise VmUnreachable(
                    f"the monitor of {self.spec} is not that of process {self.pid}, but of"
                    f" {monitor.qemu_pid or 'one that cannot be seen from here'}",
                    "if it is the right VM, name it by its socket: --vm qmp:PATH",
                )
        return monitor


def find_vm(spec: str) -> VmAddress:
    """Resolve a name of one of the `VM_FORMS`.

    Raises:
        UsageError: the text is none of these.
        VmUnreachable: there is no such VM, or it has no QMP that we can use.
    """
    kind, _, rest = spec.partition(":")
    match kind:
        case "libvirt" if rest:
            domain = find_domain(rest)
            return VmAddress(spec, domain, domain.agent)
        case "name" if rest:
            return address_of_process(spec, _named(rest))
        case "qmp" if rest:
            return VmAddress(spec, Path(rest), None)
        case "pid" if rest.isascii() and rest.isdecimal():
            return address_of_process(spec, qemu_process(int(rest)))
        case "lab" if rest:
            return _lab_vm(spec, rest)
    raise UsageError(f"{spec!r} does not name a VM", VM_FORMS)


def address_of_process(spec: str, process: QemuProcess) -> VmAddress:
    """Return the addresses on the command line of a QEMU process.

    Raises:
        VmUnreachable: it has no QMP socket that we can use.
    """
    for path in process.qmp:
        if path.is_socket():
            return VmAddress(spec, path, process.agent, process.pid)
    if process.libvirt:
        raise VmUnreachable(
            f"libvirt owns the monitor of QEMU {process.pid}", f"--vm libvirt:{process.name}"
        )
    raise VmUnreachable(f"QEMU {process.pid} has no QMP socket with a path", _OWN_MONITOR)


def lab_addresses() -> list[VmAddress]:
    """Return this user's lab VMs by name, dead ones too."""
    found = []
    for path in sorted(lab_directory().glob(f"*/{LAB_STATE}")):
        try:
            found.append(find_vm(f"lab:{path.parent.name}"))
        except VmUnreachable:  # removed meanwhile, or not readable for us
            continue
    return found


def lab_directory(name: str = "") -> Path:
    """Return the directory of the lab VM `name`, or of all lab VMs; it need not exist.

    It is below ``$XDG_RUNTIME_DIR/ovr``, for root without one ``/run/ovr``, else ``/tmp/ovr-UID``.

    Raises:
        UsageError: not a valid name of a VM.
        LabError: another user can change the directory.
    """
    if name and not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a lab VM",
            "up to 32 letters, digits, dots, dashes and underscores, a letter or digit first",
        )
    return _runtime_directory() / "lab" / name


def _named(name: str) -> QemuProcess:
    # Any user can give any name to a QEMU: only the caller's own are found by name.
    every = [process for process in qemu_processes() if process.name == name]
    found = [process for process in every if process.uid == os.geteuid()]
    if not every:
        raise VmUnreachable(f"no QEMU here has the name {name}", "ovr list shows what runs")
    if not found:
        whose = ", ".join(f"pid:{process.pid} of {_user(process.uid)}" for process in every)
        raise VmUnreachable(
            f"the name {name} is that of another user's QEMU: {whose}",
            "if it is the right VM, name it by its pid",
        )
    if len(found) > 1:
        pids = ", ".join(f"pid:{process.pid}" for process in found)
        raise VmUnreachable(f"{len(found)} QEMUs here have the name {name}", f"say which: {pids}")
    return found[0]


def _user(uid: int | None) -> str:
    return "a set-uid program" if uid is None else f"user {uid}"


def _lab_vm(spec: str, name: str) -> VmAddress:
    path = lab_directory(name) / LAB_STATE
    try:
        state = json.loads(path.read_bytes())
        return VmAddress(spec, Path(state["qmp"]), str(state["agent"]))
    except FileNotFoundError as error:
        raise VmUnreachable(f"there is no lab VM {name}", f"ovr lab up {name}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VmUnreachable(f"the lab's state file {path} cannot be read: {error}") from error


def _runtime_directory() -> Path:
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(base) / "ovr"
    elif os.geteuid() == 0:
        path = Path("/run/ovr")
    else:
        path = Path(f"/tmp/ovr-{os.geteuid()}")
    try:
        # In /tmp it is made at once, before another user makes it.
        with Directory.private(path, create=path.parent == Path("/tmp")):
            pass
    except FileNotFoundError:
        pass
    except OSError as error:
        raise LabError(
            f"{path} cannot be used for lab VMs: {error.strerror}",
            "set XDG_RUNTIME_DIR to a directory of your own",
        ) from error
    return path
