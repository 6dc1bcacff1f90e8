"""KVM or TCG: a ``/dev/kvm`` that opens is not enough.

On some nested hosts a stock kernel hangs in early boot under KVM. So ``auto`` uses KVM only
after a guest has booted with it, and stores the result for this host kernel and QEMU.
"""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from ovr.errors import LabError
from ovr.lab.cache import cached, digest
from ovr.lab.tools import need_tool

__all__ = ["ACCELS", "Accel", "Engine", "choose", "cpu_model", "qemu_program"]

Accel = Literal["auto", "kvm", "tcg"]
Engine = Literal["kvm", "tcg"]
ACCELS: Final[tuple[Accel, ...]] = ("auto", "kvm", "tcg")


def choose(accel: Accel, boots: Callable[[], bool]) -> Engine:
    """Choose the accelerator of a VM.

    Args:
        accel: the user's choice.
        boots: tests whether a guest boots under KVM; called once for each host kernel and QEMU.

    Raises:
        LabError: KVM is requested by name, and the host has none.
    """
    if accel == "tcg":
        return "tcg"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        if accel == "kvm":
            raise LabError("/dev/kvm cannot be used", "take --accel tcg, or load and permit KVM")
        return "tcg"
    if accel == "kvm":
        return "kvm"
    return "kvm" if _verdict(boots) else "tcg"


def cpu_model(engine: Engine, la57: bool | None) -> str:
    """Return QEMU's ``-cpu`` value; `la57` enables or disables 5-level paging, None leaves it.

    Raises:
        LabError: 5-level paging is requested, and the host CPU has none.
    """
    if engine == "kvm":
        if la57 and " la57 " not in Path("/proc/cpuinfo").read_text().replace("\n", " \n"):
            raise LabError("this host's CPU has no 5-level paging", "take --accel tcg")
        model = "host"
    else:
        # erms and fsrm make TCG zero guest memory five times slower; with cx16, QEMU 7.2 now and
        # then corrupts EFLAGS and the guest dies of double faults.
        model = "max,-erms,-fsrm,-cx16"
    return model if la57 is None else f"{model},la57={'on' if la57 else 'off'}"


def qemu_program() -> str:
    """Return QEMU's path, or raise `LabError`."""
    return need_tool("qemu-system-x86_64", "qemu-system-x86")


def _verdict(boots: Callable[[], bool]) -> bool:
    version = subprocess.run([qemu_program(), "--version"], capture_output=True, check=True).stdout

    def judge(work: Path) -> None:
        (work / "verdict").write_text(json.dumps(boots()))

    entry = cached(f"kvm-{digest(platform.release(), platform.version(), version)}", judge)
    return json.loads((entry / "verdict").read_text()) is True
