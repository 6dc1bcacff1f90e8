"""Figures of a run, kept in `bench/results.json`: medians and spread, machine, versions.

A run replaces the figures that it measures and leaves the others; each names its run, so that
one can see what was measured together. `bench/README.md` says which key is what.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from ovr.lab import LabVm
from ovr.lab.accel import qemu_program

SCHEMA = "ovr.bench/1"
COMMITTED = Path(__file__).with_name("results.json")


def figure(values: Sequence[float], unit: str) -> dict[str, Any]:
    """Return a summary of the values of all rounds."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
        "unit": unit,
    }


class Results:
    """The figures of this run; `write` puts them among those of earlier ones."""

    def __init__(self, path: Path, **conditions: Any) -> None:
        self.path = path
        self.figures: dict[str, dict[str, Any]] = {}
        self.conditions: dict[str, Any] = conditions
        self._run = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def put(self, key: str, values: Sequence[float], unit: str = "s") -> None:
        """Keep the values of all rounds under a key."""
        self.figures[key] = figure(values, unit) | {"run": self._run}

    def put_race(
        self, state: str, heats: Mapping[str, Sequence[Mapping[str, float]]],
        units: Mapping[str, str],
    ) -> None:  # fmt: skip
        """Keep all measures of all lanes of a race.

        Args:
            state: of the VM, a part of the keys.
            heats: as of `bench.race.race`.
            units: of measures that are not seconds.
        """
        for lane, laps in heats.items():
            for measure in laps[0]:
                name = f"{lane}.{state}" + ("" if measure == "seconds" else f".{measure}")
                self.put(name, [lap[measure] for lap in laps], units.get(measure, "s"))

    def note(self, key: str, text: str) -> None:
        """Say why there is no figure."""
        self.figures[key] = {"note": text, "run": self._run}

    def describe(self, vm: LabVm) -> None:
        """Keep on which machine this was, and with which versions."""
        self.conditions |= machine() | guest(vm)

    def write(self) -> None:
        """Merge with the file; runs without results left are dropped."""
        if not self.figures:
            return
        old = json.loads(self.path.read_text()) if self.path.exists() else {}
        figures = dict(sorted((old.get("figures", {}) | self.figures).items()))
        used = {one["run"] for one in figures.values()}
        runs = old.get("runs", {}) | {self._run: self.conditions}
        runs = {run: about for run, about in sorted(runs.items()) if run in used}
        whole = {"schema": SCHEMA, "runs": runs, "figures": figures}
        self.path.write_text(json.dumps(whole, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Describe the host."""
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    qemu = subprocess.run([qemu_program(), "--version"], capture_output=True, text=True, check=True)
    return {
        "cpu": models[0].partition(":")[2].strip() if models else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": qemu.stdout.splitlines()[0].removeprefix("QEMU emulator version "),
        "ovr": importlib.metadata.version("ovr"),
    }


def guest(vm: LabVm) -> dict[str, Any]:
    """Describe the VM."""
    command = "uname -r; criu --version | sed -n 's/^Version: //p'"
    kernel, criu = vm.sh(command).stdout.decode().split()
    return {
        "accelerator": vm.hardware.engine,
        "vm_cpus": vm.hardware.cpus,
        "vm_memory_bytes": vm.hardware.memory,
        "guest": vm.suite,
        "guest_kernel": kernel,
        "guest_criu": criu,
    }
