"""The RAM files of a lab VM: in memory, of huge pages where root can have them.

First touch of fresh host memory costs far more than the copy; QEMU allocates all of it
(``prealloc=on``), and a tmpfs mounted with ``huge=always`` needs no faults page by page.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import psutil

from ovr.errors import LabError
from ovr.lab.cache import digest

__all__ = ["drop_ram", "make_ram", "memory_size"]

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_GRAIN = 2 << 20  # a huge page
_RESERVE = 512 << 20  # QEMU itself (256 MiB of translated code), and room for the host


def memory_size(text: str | int, nodes: int = 1) -> int:
    """Return the bytes that ``4G``, ``1536M`` or a plain number of bytes stands for.

    Raises:
        LabError: not a size, or not a whole number of huge pages for each NUMA node.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    if match is None:
        raise LabError(f"{text!r} is not a size of memory", "write 4G or 1536M")
    size = int(match[1]) << _UNITS[match[2].upper()]
    if size == 0 or size % (_GRAIN * nodes):
        raise LabError(f"{text} of memory is not a multiple of {2 * nodes}M")
    return size


def make_ram(directory: Path, size: int, nodes: int) -> tuple[Path, ...]:
    """Return `nodes` paths for RAM files of `size` bytes in all; QEMU will make the files.

    Args:
        directory: of the VM.
        size: bytes of RAM in all files together.
        nodes: number of files.

    Raises:
        LabError: the host does not have so much memory free.
    """
    free = psutil.virtual_memory().available
    mounted, plain = _places(directory)
    if _mount(mounted, size):
        place = mounted
    else:
        place = plain
        place.mkdir(mode=0o700)
        free = min(free, shutil.disk_usage(place).free + _RESERVE)
    if free < size + _RESERVE:
        drop_ram(directory)
        raise LabError(
            f"{size >> 20} MiB of RAM do not fit: {max(free - _RESERVE, 0) >> 20} MiB are free",
            "ask for less, or end other VMs (ovr lab ls)",
        )
    return tuple(place / f"node{number}" for number in range(nodes))


def drop_ram(directory: Path) -> None:
    """Remove what `make_ram` and QEMU made for the VM of this directory, if anything."""
    for place in _places(directory):
        mounted = place.is_mount()
        shutil.rmtree(place, ignore_errors=True)  # the files go, though somebody may map them
        if mounted:
            subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=False)
            shutil.rmtree(place, ignore_errors=True)


def _places(directory: Path) -> tuple[Path, Path]:
    # Where root mounts a tmpfs of huge pages, and what others have.
    return directory / "ram", Path("/dev/shm") / f"ovr-{digest(str(directory))}"


def _mount(place: Path, size: int) -> bool:
    if os.geteuid() != 0:
        return False
    place.mkdir(mode=0o700)
    options = f"huge=always,mode=0700,size={size}"
    command = ["mount", "-t", "tmpfs", "-o", options, "ovr-lab", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        return True
    place.rmdir()  # root of a container, who may not mount
    return False
