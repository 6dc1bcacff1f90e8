"""The virtio-vsock device: the kernel's own if the host has it, else vhost-device-vsock.

The guest sees no difference. With ``/dev/vhost-vsock`` the host talks AF_VSOCK to a CID; with
vhost-device-vsock (a vhost-user daemon of the rust-vmm project) it connects to a unix socket and
writes ``CONNECT port``.
"""

import random
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from ovr.errors import LabError
from ovr.guest.protocol import VSOCK_PORT
from ovr.lab.cache import cached
from ovr.lab.process import Process, await_socket, spawn
from ovr.lab.tools import mmdebstrap

__all__ = ["AGENT_PORT", "Vsock", "add_vsock"]

AGENT_PORT = VSOCK_PORT
_PROGRAM = "vhost-device-vsock"
_SUITE = "sid"  # no Debian release has the package yet


@dataclass(frozen=True)
class Vsock:
    """A vsock device for QEMU.

    Attributes:
        arguments: for QEMU's command line.
        address: of the agent behind it, in the form of ``--agent``.
        daemon: the process behind the device, or None if it is the host's kernel.
    """

    arguments: tuple[str, ...]
    address: str
    daemon: Process | None


def add_vsock(directory: Path) -> Vsock:
    """Make a vsock device ready; its sockets and log go to `directory`.

    Raises:
        LabError: the daemon cannot be fetched, or does not start.
    """
    cid = random.randrange(3, 1 << 31)
    if _host_has_vsock():
        kernel_device = ("-device", f"vhost-vsock-pci,guest-cid={cid}")
        return Vsock(kernel_device, f"vsock:{cid}:{AGENT_PORT}", None)
    back, front, log = (directory / name for name in ("vsock.vhost", "vsock", "vsock.log"))
    options = f"guest-cid={cid},socket={back},uds-path={front}"
    daemon = spawn([str(_program()), "--vm", options], log)
    await_socket(back, daemon, log)
    device = ("-chardev", f"socket,id=vsock,path={back}",
              "-device", "vhost-user-vsock-pci,chardev=vsock")  # fmt: skip
    return Vsock(device, f"unix:{front}:{AGENT_PORT}", daemon)


def _host_has_vsock() -> bool:
    try:
        with Path("/dev/vhost-vsock").open("rb+", buffering=0):
            return True
    except OSError:
        return False


def _program() -> Path:
    if found := shutil.which(_PROGRAM):
        return Path(found)
    return cached(_PROGRAM, _fetch) / _PROGRAM


def _fetch(work: Path) -> None:
    archive, program = work / "tree.tar", work / _PROGRAM
    mmdebstrap(_SUITE, "extract", [_PROGRAM], archive)
    with tarfile.open(archive) as tar:
        content = tar.extractfile(f"./usr/bin/{_PROGRAM}")
        program.write_bytes(content.read() if content else b"")
    program.chmod(0o755)
    archive.unlink()
    trial = subprocess.run([program, "--version"], capture_output=True, check=False)
    if trial.returncode:
        raise LabError(
            f"{_PROGRAM} of Debian {_SUITE} does not run on this host",
            "install it from the host's own distribution",
        )
