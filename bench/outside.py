"""`ovr restore` as a user starts it: a command, from its start to its end, in a lab VM."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.race import Measures
from ovr.host.credentials import peer_of
from ovr.lab import LabVm
from ovr.standby.place import connect

# Where it is set, every start compiles all of ovr, which an installed one does not.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
PHASES = ("attach", "plan", "skeleton", "populate", "memory", "state", "verify", "commit")


class Outside:
    """Restores images into a VM from outside.

    Args:
        vm: the VM.
        images: on the host.
    """

    def __init__(self, vm: LabVm, images: Path) -> None:
        self._target = f"lab:{vm.name}"
        self._images = images

    def run(self, skeleton: str = "cold") -> Measures:
        """Restore, by a skeleton of this kind: wall and CPU time of the command, and its phases.

        ``start`` is what is left of the wall time: loading Python and ovr, and ending.
        """
        with tempfile.TemporaryFile() as errors:
            before = _of_standby()
            begin = time.perf_counter()
            with self._start(errors) as command:
                output = command.stdout.read()
                status, usage = _end(command)
            seconds = time.perf_counter() - begin
            elsewhere = _of_standby() - before
            errors.seek(0)
            assert status == 0, errors.read().decode()
        report = json.loads(output)
        assert report.get("skeleton", "cold") == skeleton, report.get("skeleton_why")
        phases = {phase: report["seconds"].get(phase, 0.0) for phase in PHASES}
        return {
            "seconds": seconds,
            "cpu": usage.ru_utime + usage.ru_stime + elsewhere,
            "start": seconds - report["seconds"]["total"],
            "held": report["held"]["seconds"],
            "bytes": report["bytes_outside"],
            **phases,
        }

    def peak_memory(self) -> int:
        """Restore once more, and return the most memory that was not of mapped files, in bytes."""
        peak = 0
        with tempfile.TemporaryFile() as errors, self._start(errors) as command:
            status = Path(f"/proc/{command.pid}/status")
            while command.poll() is None:
                for line in _lines(status):
                    if line.startswith("RssAnon:"):
                        peak = max(peak, int(line.split()[1]) << 10)
                time.sleep(0.002)
            command.stdout.read()
        assert command.returncode == 0
        return peak

    def _start(self, errors) -> subprocess.Popen:
        command = ["restore", "-D", str(self._images), "--vm", self._target, "--json"]
        return subprocess.Popen(
            [sys.executable, "-m", "ovr", *command], stdout=subprocess.PIPE, stderr=errors,
            env=ENVIRONMENT,
        )  # fmt: skip


def _of_standby() -> float:
    # CPU seconds of the children of the process that stands by (cutime and cstime, proc(5)).
    try:
        with connect() as server:
            pid, _ = peer_of(server)
    except OSError:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def _end(command: subprocess.Popen):
    _, status, usage = os.wait4(command.pid, 0)
    command.returncode = os.waitstatus_to_exitcode(status)
    return command.returncode, usage


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
