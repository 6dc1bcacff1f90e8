"""Kernel packages for lab guests: any kernel of Debian, with any suite.

A package is unpacked, not installed, so that the kernel of one release boots with the programs
of another. Its modules are on a file system of their own: the guest's disk stays the suite's.
"""

import re
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ovr.errors import LabError
from ovr.lab.cache import cached, digest
from ovr.lab.initramfs import Modules, unpacked_module
from ovr.lab.tools import mmdebstrap, need_tool, run_tool

__all__ = ["GuestKernel", "KernelPackage", "guest_kernel", "write_kernel"]

_FIRST: Final = ("virtio_pci", "virtio_blk", "ext4", "virtio_rng", "virtio_console", "virtiofs",
                 "vmw_vsock_virtio_transport")  # fmt: skip
_FOLDER: Final = re.compile(r"(?:\./)?(?:usr/)?lib/modules/([^/]+)/(.+)")
_IMAGE: Final = re.compile(r"(?:\./)?boot/vmlinuz-(.+)")
_DISK_SIZE: Final = "2G"  # sparse
_RECIPE: Final = "1"  # to be raised when a change of the build changes the result


@dataclass(frozen=True)
class GuestKernel:
    """A kernel that lab VMs boot. The files are shared: nothing may write to them.

    Attributes:
        vmlinuz: its bzImage.
        modules: directory of the kernel modules to load first; their names sort in load order.
        disk: raw ext4 file system with all modules, for the guest's ``/lib/modules``; None where
            the guest's own disk has them.
    """

    vmlinuz: Path
    modules: Path
    disk: Path | None


@dataclass(frozen=True)
class KernelPackage:
    """A Debian package with a kernel, and the release to take it from.

    Attributes:
        name: such as ``linux-image-rt-amd64``.
        release: such as ``trixie``, ``trixie-backports`` or ``experimental``.
    """

    name: str
    release: str

    @classmethod
    def parse(cls, text: str, suite: str) -> "KernelPackage":
        """Parse ``PACKAGE`` or ``PACKAGE/RELEASE``; without a release, it is `suite`.

        Raises:
            LabError: not a package's name, or not a release's.
        """
        name, slash, release = text.partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name):
            raise LabError(f"{name!r} is not the name of a package", "such as linux-image-rt-amd64")
        if slash and not re.fullmatch(r"[a-z][a-z0-9-]*", release):
            raise LabError(f"{release!r} is not a release of Debian", "such as trixie-backports")
        return cls(name, release or suite)

    @property
    def base(self) -> str:
        """The release on which this one is based, which has the packages that it needs."""
        if self.release in ("experimental", "rc-buggy"):
            return "sid"
        return self.release.partition("-")[0]


def guest_kernel(package: KernelPackage) -> GuestKernel:
    """Return the kernel of a package; fetch missing parts.

    Raises:
        LabError: a tool of the host is missing, there is no such package, or it has no kernel.
    """
    need_tool("depmod", "kmod")
    key = digest(_RECIPE, package.name, package.release)
    place = cached(f"kernel-{key}", lambda work: _build(work, package))
    return GuestKernel(place / "vmlinuz", place / "modules", place / "disk")


def write_kernel(work: Path, vmlinuz: bytes, read: Callable[[str], bytes]) -> None:
    """Write the files of a `GuestKernel`, except the disk, into `work`.

    Args:
        work: an empty directory, or one with the disk.
        vmlinuz: the kernel.
        read: returns a file of the kernel's directory of modules; raises LookupError.
    """

    def text(name: str) -> str:
        try:
            return read(name).decode()
        except LookupError:
            return ""

    modules = Modules(
        text("modules.dep"), text("modules.builtin"), text("modules.softdep"), text("modules.alias")
    )
    (work / "vmlinuz").write_bytes(vmlinuz)
    (work / "modules").mkdir()
    for number, path in enumerate(modules.plan(_FIRST)):
        data = unpacked_module(path, read(path))
        (work / "modules" / f"{number:02}.ko").write_bytes(data)


def _build(work: Path, package: KernelPackage) -> None:
    system, tree = work / "system.tar", work / "tree"
    try:
        mmdebstrap(
            package.base, "extract", (), system,
            release=package.release, script=_download(package),
        )  # fmt: skip
    except LabError as error:
        raise LabError(
            f"{package.name} cannot be fetched from Debian {package.release}: {error}",
            "name the release that has it: --kernel PACKAGE/RELEASE, such as"
            " linux-image-amd64/trixie-backports",
        ) from error
    vmlinuz, version = _unpack(system, tree, package)
    system.unlink()
    folder = tree / "lib" / "modules" / version
    run_tool([need_tool("depmod", "kmod"), "-b", str(tree), version])
    _make_disk(folder.parent, work / "disk")

    def read(name: str) -> bytes:
        path = folder / name
        if not path.is_file():
            raise LookupError(name)
        return path.read_bytes()

    write_kernel(work, vmlinuz, read)
    subprocess.run(["rm", "-r", str(tree)], check=True)


def _download(package: KernelPackage) -> str:
    # The package and those of its dependencies that are parts of the kernel, unpacked. They are not
    # installed: that takes longer, and old backports lack dependencies.
    apt = f"-t {package.release}" if package.release != package.base else ""
    parts = f"apt-cache {apt} depends --recurse --important {package.name} | sort -u"
    return f"""set -e
        mkdir "$1/packages"
        cd "$1/packages"
        apt-get -q {apt} download {package.name}
        for one in $({parts} | grep -E '^linux-(image|binary|modules|base)-'); do
            [ $one = {package.name} ] || apt-get -q {apt} download $one || true
        done
        for one in *.deb; do dpkg-deb -x "$one" "$1"; done
        rm -r "$1/packages"
    """


def _unpack(system: Path, tree: Path, package: KernelPackage) -> tuple[bytes, str]:
    # The kernel, and its modules below `tree`. New packages have vmlinuz there, too.
    kernels: dict[str, bytes] = {}
    with tarfile.open(system) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            if match := _IMAGE.fullmatch(member.name):
                kernels[match[1]] = content.read()
            elif match := _FOLDER.fullmatch(member.name):
                if match[2] == "vmlinuz":
                    kernels[match[1]] = content.read()
                    continue
                path = tree / "lib" / "modules" / match[1] / match[2]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())
    if len(kernels) != 1:
        raise LabError(
            f"package {package.name} brings {len(kernels)} kernels, not one",
            "name a package such as linux-image-amd64",
        )
    [(version, vmlinuz)] = kernels.items()
    if not (tree / "lib" / "modules" / version / "kernel").is_dir():
        raise LabError(
            f"Debian {package.release} has the kernel of {package.name}, but not its modules",
            "name a newer one",
        )
    return vmlinuz, version


def _make_disk(folder: Path, disk: Path) -> None:
    mke2fs = need_tool("mke2fs", "e2fsprogs")
    options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0"]
    run_tool([mke2fs, *options, "-d", str(folder), str(disk), _DISK_SIZE])
