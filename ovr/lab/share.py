"""A directory of the host inside a lab VM, by virtio-fs: CRIU dumps straight to the host."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ovr.errors import LabError
from ovr.lab.process import Process, await_socket, spawn
from ovr.lab.tools import need_tool

__all__ = ["SHARE", "add_share", "share_device"]

SHARE = "/mnt/share"
"""Its mount point in the guest."""

# The alternative, namespaces, needs pivot_root, which fails in chroots and many containers.
_SANDBOX = "chroot" if os.geteuid() == 0 else "namespace"
_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")


def add_share(shared: Path, directory: Path) -> Process:
    """Start virtiofsd for the directory `shared`; its socket and log go to `directory`.

    Raises:
        LabError: no such directory, no virtiofsd, or it does not start.
    """
    if not shared.is_dir():
        raise LabError(f"{shared} is not a directory to share with a VM")
    log = directory / "virtiofsd.log"
    daemon = spawn(_command(_program(), shared.resolve(), _socket(directory)), log)
    await_socket(_socket(directory), daemon, log)
    return daemon


def share_device(directory: Path) -> tuple[str, ...]:
    """Return QEMU's arguments for the device; init knows the tag."""
    return ("-chardev", f"socket,id=share,path={_socket(directory)}",
            "-device", "vhost-user-fs-pci,chardev=share,tag=share")  # fmt: skip


def _socket(directory: Path) -> Path:
    return directory / "virtiofs.vhost"


def _program() -> str:
    # Neither of the two places is on PATH.
    for path in _PLACES:
        if Path(path).exists():
            return path
    return need_tool("virtiofsd", "virtiofsd")


def _command(program: str, shared: Path, socket: Path) -> Sequence[str]:
    # The C virtiofsd that came with QEMU up to 7.2 takes the directory as a mount option.
    usage = subprocess.run([program, "--help"], capture_output=True, text=True, check=False).stdout
    if "--shared-dir" in usage:
        options = [f"--shared-dir={shared}", "--cache=auto", f"--sandbox={_SANDBOX}"]
    else:
        options = ["-o", f"source={shared}", "-o", f"cache=auto,sandbox={_SANDBOX}"]
    return [program, f"--socket-path={socket}", *options]
