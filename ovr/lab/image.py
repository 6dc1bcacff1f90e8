"""Guest images: a Debian suite with its stock kernel and stock CRIU, built once and cached.

The disk holds the suite alone; our init and agent come with the initramfs, so that a new agent
does not need a new disk. Two VMs of a suite boot from the same disk file, each with a temporary
overlay, since CRIU compares the files that a process had open.
"""

import os
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ovr.errors import LabError
from ovr.lab.cache import cached, digest
from ovr.lab.initramfs import initramfs
from ovr.lab.kernel import GuestKernel, KernelPackage, guest_kernel, write_kernel
from ovr.lab.tools import mmdebstrap, need_tool, run_tool

__all__ = ["SUITES", "GuestImage", "guest_image"]

SUITES = ("trixie", "bookworm", "forky")
_PACKAGES = ("linux-image-cloud-amd64", "criu", "iproute2", "kmod", "procps")
_DISK_SIZE = "16G"  # sparse
_RECIPE = "2"  # to be raised when a change of the build changes the result


@dataclass(frozen=True)
class GuestImage:
    """The files from which lab VMs boot. They are shared and must not be written to.

    Attributes:
        suite: the Debian suite.
        disk: raw ext4 file system.
        kernel: the suite's or another one.
    """

    suite: str
    disk: Path
    kernel: GuestKernel

    def initramfs(self, agent: Path) -> bytes:
        """Return an initramfs with our init, the kernel modules and this agent program."""
        modules = [path.read_bytes() for path in sorted(self.kernel.modules.iterdir())]
        return initramfs(_init_program(), agent.read_bytes(), modules)


def guest_image(suite: str, packages: Sequence[str] = (), kernel: str = "") -> GuestImage:
    """Return the image of a suite with further Debian packages; build missing parts.

    Args:
        suite: one of `SUITES`.
        packages: additional packages for the guest.
        kernel: ``PACKAGE`` of the suite or ``PACKAGE/RELEASE``; "" is the suite's cloud kernel.

    Raises:
        LabError: unknown suite or kernel, a tool of the host is missing, or the build failed.
    """
    if suite not in SUITES:
        raise LabError(f"the lab has no suite {suite}", f"take one of {', '.join(SUITES)}")
    package = KernelPackage.parse(kernel, suite) if kernel else None
    wanted = sorted({*_PACKAGES, *packages})
    base = cached(
        f"guest-{suite}-{digest(_RECIPE, suite, *wanted)}",
        lambda work: _build_base(work, suite, wanted),
    )
    own = GuestKernel(base / "vmlinuz", base / "modules", None)
    return GuestImage(suite, base / "disk", guest_kernel(package) if package else own)


def _build_base(work: Path, suite: str, packages: Sequence[str]) -> None:
    system = work / "system.tar"
    mmdebstrap(suite, "minbase", packages, system)
    _take_kernel(system, work)
    _make_disk(system, work / "disk")
    system.unlink()


def _take_kernel(system: Path, work: Path) -> None:
    with tarfile.open(system) as tar:
        files = {member.name.removeprefix("./"): member for member in tar if member.isfile()}

        def content(name: str) -> bytes:
            file = tar.extractfile(files[name])
            return file.read() if file else b""

        kernels = [name for name in files if name.startswith("boot/vmlinuz-")]
        listings = [name for name in files if name.endswith("/modules.dep")]
        if len(kernels) != 1 or len(listings) != 1:
            raise LabError(
                f"the guest would have {len(kernels)} kernels",
                "name a kernel package as the kernel, not among the packages",
            )
        folder = listings[0].removesuffix("modules.dep")
        write_kernel(work, content(kernels[0]), lambda name: content(folder + name))


def _make_disk(system: Path, disk: Path) -> None:
    # mke2fs copies a directory with its owners: other users than root use a user namespace.
    # No journal and few inodes: the disk is thrown away after each boot.
    mke2fs = need_tool("mke2fs", "e2fsprogs")
    with tempfile.TemporaryDirectory(prefix="root-", dir=disk.parent) as root:
        script = """trap 'rm -rf "$1/tree"' EXIT
            mkdir "$1/tree"
            tar -C "$1/tree" --exclude='./dev/*' --numeric-owner -xpf "$2"
            "$4" -q -F -t ext4 -O ^has_journal -m 0 -N 200000 -d "$1/tree" "$3" "$5"
        """
        namespace = [] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--map-auto"]
        values = [root, str(system), str(disk), mke2fs, _DISK_SIZE]
        run_tool([*namespace, "sh", "-ec", script, "sh", *values])


def _init_program() -> bytes:
    source = Path(__file__).with_name("init.c")
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static"]

    def build(work: Path) -> None:
        compiler = need_tool("gcc", "gcc libc6-dev")
        run_tool([compiler, *flags, "-o", str(work / "init"), str(source)])

    key = digest(source.read_bytes(), *flags)
    return (cached(f"init-{key}", build) / "init").read_bytes()
