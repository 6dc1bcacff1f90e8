"""The warm skeleton: `ovr warm --vm VM -D IMAGES`, and `--off`."""

import subprocess
import sys
from pathlib import Path

from ovr.lab import LabVm


class Warm:
    """Memory that a VM has ready for a restore.

    Args:
        vm: the VM.
        images: what will be restored.
    """

    def __init__(self, vm: LabVm, images: Path) -> None:
        self._vm, self._images = vm, images
        self.exists = self._ovr("--help").returncode == 0

    def on(self) -> None:
        """Have it ready; returns when it is."""
        done = self._ovr("--vm", f"lab:{self._vm.name}", "-D", str(self._images))
        assert done.returncode == 0, done.stderr

    def off(self) -> None:
        """Return its remains to the guest."""
        done = self._ovr("--vm", f"lab:{self._vm.name}", "--off")
        assert done.returncode == 0, done.stderr

    def _ovr(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "ovr", "warm", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)
