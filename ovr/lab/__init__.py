"""The lab: Debian guests in QEMU, made and booted by this repository to try things on."""

from ovr.lab.machine import LabVm, get, ls, up

__all__ = ["LabVm", "get", "ls", "up"]
