"""From what the user types to where the VM listens: ``qmp:PATH``, ``pid:N``, ``lab:NAME``.

The lab writes one state file a VM, in the directory that `lab_directory` names. This module
reads two of its keys (``qmp`` and ``agent``); that is all that is known of the lab here, and
`ovr.lab` takes the place of the files from here.
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from ovr.errors import LabError, UsageError, VmUnreachable

__all__ = ["LAB_STATE", "VmAddress", "find_vm", "lab_directory", "qmp_sockets"]

LAB_STATE = "vm.json"
"""The name of the state file in a lab VM's directory."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_OWN_MONITOR = "give it one more monitor: -qmp unix:PATH,server=on,wait=off"


@dataclass(frozen=True)
class VmAddress:
    """Where a VM can be reached.

    Attributes:
        spec: what the user typed.
        qmp: path of the QMP socket.
        agent: address of the guest's agent as ``--agent`` takes it, where it is known.
    """

    spec: str
    qmp: Path
    agent: str | None


def find_vm(spec: str) -> VmAddress:
    """Resolve ``qmp:PATH``, ``pid:N`` or ``lab:NAME``.

    Raises:
        UsageError: the text is none of these.
        VmUnreachable: there is no such VM, or it has no QMP socket that we can use.
    """
    kind, _, rest = spec.partition(":")
    match kind:
        case "qmp" if rest:
            return VmAddress(spec, Path(rest), None)
        case "pid" if rest.isascii() and rest.isdecimal():
            return VmAddress(spec, _qmp_of_process(int(rest)), None)
        case "lab" if rest:
            return _lab_vm(spec, rest)
    raise UsageError(f"{spec!r} does not name a VM", "qmp:PATH, pid:N or lab:NAME")


def lab_directory(name: str = "") -> Path:
    """Return the directory of the lab VM `name`, or of all lab VMs; it need not exist.

    It is below ``$XDG_RUNTIME_DIR/ovr``, for root without one ``/run/ovr``, else ``/tmp/ovr-UID``.

    Raises:
        UsageError: not a name that a VM can have.
        LabError: somebody else made the directory in /tmp.
    """
    if name and not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a lab VM",
            "up to 32 letters, digits, dots, dashes and underscores, a letter or digit first",
        )
    return _runtime_directory() / "lab" / name


def qmp_sockets(command_line: Sequence[str]) -> Iterator[str]:
    """Yield the paths of the QMP unix sockets that a QEMU command line asks for."""
    chardevs: dict[str, str] = {}
    controls = []
    for option, value in pairwise(command_line):
        match option.removeprefix("-") if option.startswith("--") else option:
            case "-qmp" | "-qmp-pretty" if value.startswith("unix:"):
                yield _fields("path=" + value.removeprefix("unix:"))["path"]
            case "-chardev":
                fields = _fields(value, "backend")
                if fields.get("backend") == "socket" and "path" in fields:
                    chardevs[fields.get("id", "")] = fields["path"]
            case "-mon":
                fields = _fields(value, "chardev")
                if fields.get("mode") == "control":
                    controls.append(fields.get("chardev", ""))
    yield from (chardevs[name] for name in controls if name in chardevs)


def _fields(value: str, first: str = "") -> dict[str, str]:
    # QEMU's option syntax: key=value pairs between commas, a comma itself is written twice.
    fields: dict[str, str] = {}
    for number, part in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, text = part.partition("=")
        if number == 0 and first and not equals:
            key, text = first, part
        fields.setdefault(key, text.replace("\0", ","))
    return fields


def _qmp_of_process(pid: int) -> Path:
    try:
        process = psutil.Process(pid)
        command_line = process.cmdline()
        sockets = list(qmp_sockets(command_line))
        paths = [Path(path) if path.startswith("/") else Path(process.cwd(), path)
                 for path in sockets]  # fmt: skip
    except psutil.NoSuchProcess as error:
        raise VmUnreachable(f"there is no process {pid}") from error
    except psutil.AccessDenied as error:
        raise VmUnreachable(
            f"process {pid} may not be looked at", "run as root or as the user that runs QEMU"
        ) from error
    if not any("qemu" in word for word in command_line[:1]) and not sockets:
        raise VmUnreachable(f"process {pid} ({process.name()}) is not QEMU")
    for path in paths:
        if path.is_socket():
            return path
    raise VmUnreachable(f"QEMU {pid} has no QMP socket with a path", _OWN_MONITOR)


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
        return Path(base) / "ovr"
    if os.geteuid() == 0:
        return Path("/run/ovr")
    path = Path(f"/tmp/ovr-{os.geteuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise LabError(f"{path} belongs to somebody else", "set XDG_RUNTIME_DIR")
    return path
