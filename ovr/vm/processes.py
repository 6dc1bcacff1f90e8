"""QEMU processes of this host, and the addresses of VMs on their command lines.

A command line is set by its user. Any user can start a process, or the real QEMU, with any name,
UUID and socket on it: only the owner identifies it. So names are looked up among the processes of
one user (`QemuProcess.uid`), and a monitor must belong to the process (`ovr.vm.find`).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ovr.errors import VmUnreachable

if TYPE_CHECKING:
    import psutil

__all__ = [
    "AGENT_CHANNEL",
    "QemuProcess",
    "option_fields",
    "qemu_process",
    "qemu_processes",
    "qmp_sockets",
]

AGENT_CHANNEL: Final = "org.ovr.0"
"""The name of the virtio-serial port that the agent serves."""

_LIBVIRT_MONITOR: Final = "charmonitor"
"""The id of the chardev of libvirt's own monitor (qemuBuildMonitorCommandLine)."""


@dataclass(frozen=True)
class QemuProcess:
    """A running QEMU.

    Attributes:
        pid: its pid.
        command_line: its arguments, the program first.
        directory: its current directory, the base of relative paths on its command line.
        uid: its owner: its real, effective and saved user id; None if these differ, as in a
            set-uid program, whose command line another user has set.
    """

    pid: int
    command_line: tuple[str, ...]
    directory: Path
    uid: int | None

    @property
    def name(self) -> str | None:
        """The VM's name (``-name NAME`` or ``-name guest=NAME,…``)."""
        for value in self._values("-name"):
            return option_fields(value, "guest").get("guest")
        return None

    @property
    def uuid(self) -> str | None:
        """The VM's UUID (``-uuid``)."""
        return next(self._values("-uuid"), None)

    @property
    def qmp(self) -> tuple[Path, ...]:
        """The paths of its QMP sockets."""
        return tuple(self.directory / path for path in qmp_sockets(self.command_line))

    @property
    def libvirt(self) -> bool:
        """Whether libvirt started it and owns its monitor."""
        chardevs = (option_fields(value, "backend") for value in self._values("-chardev"))
        return any(chardev.get("id") == _LIBVIRT_MONITOR for chardev in chardevs)

    @property
    def agent(self) -> str | None:
        """The address that the guest's agent would have, in the form of ``--agent``, if known."""
        devices = [option_fields(value, "driver") for value in self._values("-device")]
        for device in devices:
            if device.get("driver", "").startswith("vhost-vsock") and "guest-cid" in device:
                return f"vsock:{device['guest-cid']}"
        paths = {
            chardev.get("id"): chardev["path"]
            for value in self._values("-chardev")
            if "path" in (chardev := option_fields(value, "backend"))
        }
        for device in devices:
            if device.get("name") == AGENT_CHANNEL and device.get("chardev") in paths:
                return f"serial:{self.directory / paths[device['chardev']]}"
        return None

    def _values(self, wanted: str) -> Iterator[str]:
        for option, value in pairwise(self.command_line):
            if _option(option) == wanted:
                yield value


def qemu_process(pid: int) -> QemuProcess:
    """Return the QEMU that has this pid.

    Raises:
        VmUnreachable: there is no such process, it is not QEMU, or it may not be read.
    """
    import psutil  # noqa: PLC0415 - slow to load, and not used for lab VMs

    try:
        process = psutil.Process(pid)
        command_line = process.cmdline()
        if not _is_qemu(command_line) and not list(qmp_sockets(command_line)):
            raise VmUnreachable(f"process {pid} ({process.name()}) is not QEMU")
        return QemuProcess(pid, tuple(command_line), Path(process.cwd()), _uid(process))
    except psutil.NoSuchProcess as error:
        raise VmUnreachable(f"there is no process {pid}") from error
    except psutil.AccessDenied as error:
        raise VmUnreachable(
            f"process {pid} may not be read", "run as root or as the user that runs QEMU"
        ) from error


def qemu_processes() -> list[QemuProcess]:
    """Return the QEMUs of this host that run a VM, by pid; those of other users too."""
    import psutil  # noqa: PLC0415 - as above

    found = []
    for process in psutil.process_iter():
        try:
            command_line = process.cmdline()
            if not _is_qemu(command_line) or _runs_nothing(command_line):
                continue
            uid = _uid(process)
            directory = Path(process.cwd())
        except psutil.AccessDenied:
            directory = Path("/")  # another user's: its relative paths cannot be resolved
        except psutil.NoSuchProcess:
            continue
        found.append(QemuProcess(process.pid, tuple(command_line), directory, uid))
    return found


def qmp_sockets(command_line: Sequence[str]) -> Iterator[str]:
    """Yield the paths of the QMP unix sockets that a QEMU command line asks for."""
    chardevs: dict[str, str] = {}
    controls = []
    for option, value in pairwise(command_line):
        match _option(option):
            case "-qmp" | "-qmp-pretty" if value.startswith("unix:"):
                yield option_fields("path=" + value.removeprefix("unix:"))["path"]
            case "-chardev":
                fields = option_fields(value, "backend")
                if fields.get("backend") == "socket" and "path" in fields:
                    chardevs[fields.get("id", "")] = fields["path"]
            case "-mon":
                fields = option_fields(value, "chardev")
                if fields.get("mode") == "control":
                    controls.append(fields.get("chardev", ""))
    yield from (chardevs[name] for name in controls if name in chardevs)


def option_fields(value: str, first: str = "") -> dict[str, str]:
    """Return the fields of an option's value, written as ``key=value,…`` or as a JSON object.

    Args:
        value: in the first form, a comma inside of a value is written twice.
        first: the key of a first field that has no ``key=``.
    """
    if value.startswith("{"):
        return _json_fields(value)
    fields: dict[str, str] = {}
    for number, part in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, text = part.partition("=")
        if number == 0 and first and not equals:
            key, text = first, part
        fields.setdefault(key, text.replace("\0", ","))
    return fields


def _json_fields(value: str) -> dict[str, str]:
    try:
        fields: dict[str, Any] = json.loads(value)
        return {key: str(fields[key]) for key in fields}
    except (
        ValueError,
        RecursionError,
    ):  # str() may recurse deeper than the parser
        return {}


def _uid(process: "psutil.Process") -> int | None:
    uids = {*process.uids()}
    return uids.pop() if len(uids) == 1 else None


def _option(word: str) -> str:
    return word.removeprefix("-") if word.startswith("--") else word


def _is_qemu(command_line: Sequence[str]) -> bool:
    name = Path(command_line[0]).name if command_line else ""
    return name.startswith("qemu-system-") or name in ("qemu-kvm", "kvm")


def _runs_nothing(command_line: Sequence[str]) -> bool:
    # Started by libvirt to query QEMU's capabilities.
    return any(
        _option(option) in ("-machine", "-M") and option_fields(value, "type").get("type") == "none"
        for option, value in pairwise(command_line)
    )
