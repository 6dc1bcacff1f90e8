"""The RAM of a lab VM: files in memory, of huge pages if run as root.

First touch of fresh host memory costs far more than the copy; QEMU allocates all of it
(``prealloc=on``), and a tmpfs mounted with ``huge=always`` avoids faults for single pages.
"""

import os
import shutil
import subprocess
from pathlib import Path

import psutil

from ovr.errors import LabError, UsageError
from ovr.host.size import parse_size
from ovr.lab.cache import digest
from ovr.lab.qemu import Backend

__all__ = ["drop_ram", "make_ram", "memory_size"]

_GRAIN = 8 << 10  # QEMU rejects an odd number of pages
_HUGE_PAGE = 2 << 20
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_RESERVE = 512 << 20  # QEMU itself (256 MiB of translated code), and room for the host


def memory_size(text: str | int, nodes: int = 1, backend: Backend = "file") -> int:
    """Return the number of bytes in ``4G``, ``1536M`` or a plain number.

    Raises:
        LabError: not a size, or not a multiple of the backend's pages with an equal part for each
            NUMA node.
    """
    grain = (_HUGE_PAGE if backend == "hugetlbfs" else _GRAIN) * nodes
    try:
        return parse_size(str(text), grain)
    except UsageError as error:
        raise LabError(str(error), error.hint) from error


def make_ram(directory: Path, size: int, nodes: int, backend: Backend = "file") -> tuple[Path, ...]:
    """Return `nodes` paths for RAM files of `size` bytes in all; QEMU will make the files.

    Args:
        directory: of the VM.
        size: bytes of RAM in all files together.
        nodes: number of files.
        backend: the kind of files; none are returned for memfds, which have no paths.

    Raises:
        LabError: the host has too little free memory.
    """
    if backend == "hugetlbfs":
        return _huge_files(_places(directory)[0], size, nodes)
    free = psutil.virtual_memory().available
    if backend == "memfd":
        _check_room(size, free)
        return ()
    mounted, plain = _places(directory)
    if _mount(mounted, "tmpfs", f"huge=always,size={size}"):
        place = mounted
    else:
        place = plain
        place.mkdir(mode=0o700)
        free = min(free, shutil.disk_usage(place).free + _RESERVE)
    try:
        _check_room(size, free)
    except LabError:
        drop_ram(directory)
        raise
    return tuple(place / f"node{number}" for number in range(nodes))


def drop_ram(directory: Path) -> None:
    """Remove the files of `make_ram` and QEMU for the VM of this directory, if any."""
    for place in _places(directory):
        mounted = place.is_mount()
        shutil.rmtree(place, ignore_errors=True)  # removed even while mapped
        if mounted:
            subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=False)
            shutil.rmtree(place, ignore_errors=True)


def _places(directory: Path) -> tuple[Path, Path]:
    # The mount point of root's tmpfs of huge pages, and the directory of other users.
    return directory / "ram", Path("/dev/shm") / f"ovr-{digest(str(directory))}"


def _check_room(size: int, free: int) -> None:
    if free < size + _RESERVE:
        raise LabError(
            f"{size >> 20} MiB of RAM do not fit: {max(free - _RESERVE, 0) >> 20} MiB are free",
            "ask for less, or end other VMs (ovr lab ls)",
        )


def _huge_files(place: Path, size: int, nodes: int) -> tuple[Path, ...]:
    if os.geteuid() != 0:
        raise LabError("only root can mount a hugetlbfs", "run as root, or take another backend")
    wanted = size // _HUGE_PAGE
    try:
        counts = [int((_POOL / f"{name}_hugepages").read_text()) for name in ("free", "resv", "nr")]
    except OSError as error:
        raise LabError(f"this host has no huge pages of 2 MiB: {error.strerror}") from error
    free, reserved, total = counts
    if free - reserved < wanted:
        raise LabError(
            f"{wanted} huge pages are needed, and {free - reserved} are free on this host",
            f"reserve them: sysctl vm.nr_hugepages={total + wanted - (free - reserved)}",
        )
    if not _mount(place, "hugetlbfs", f"pagesize=2M,size={size}"):
        raise LabError("a hugetlbfs cannot be mounted on this host", "take another backend")
    return tuple(place / f"node{number}" for number in range(nodes))


def _mount(place: Path, kind: str, options: str) -> bool:
    if os.geteuid() != 0:
        return False
    place.mkdir(mode=0o700)
    command = ["mount", "-t", kind, "-o", f"{options},mode=0700", "ovr-lab", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        return True
    place.rmdir()  # root of a container, without the right to mount
    return False
