"""The warm skeleton, if this `ovr` has one: `ovr warm --vm VM --size BYTES`, and `--off`."""

import subprocess
import sys

from ovr.lab import LabVm

# An area takes as much as it is long, up to whole huge pages at both ends.
ROOM = 4 << 20


class Warm:
    """Memory that a VM has ready for a restore.

    Args:
        vm: the VM.
        size: bytes of memory of what will be restored.
    """

    def __init__(self, vm: LabVm, size: int) -> None:
        self._vm, self._size = vm, size
        self.exists = self._ovr("--help").returncode == 0

    def on(self) -> None:
        """Have it ready; returns when it is."""
        done = self._ovr("--vm", f"lab:{self._vm.name}", "--size", str(self._size + ROOM))
        assert done.returncode == 0, done.stderr

    def off(self) -> None:
        """Give back what is left of it."""
        done = self._ovr("--vm", f"lab:{self._vm.name}", "--off")
        assert done.returncode == 0, done.stderr

    def _ovr(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "ovr", "warm", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)
