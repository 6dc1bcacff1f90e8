"""The lab: Debian guests in QEMU, made and booted by this repository for trials and tests."""

from ovr.lab.boot import GuestDied, up
from ovr.lab.machine import LabVm, get, ls

__all__ = ["GuestDied", "LabVm", "get", "ls", "up"]
