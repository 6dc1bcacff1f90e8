"""A process with threads that write to a RAM file: as far as a hold goes, a QEMU."""

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ovr.lab.workload import build_workload
from ovr.memory.addresses import Gpa, Offset
from ovr.memory.ram import Slot
from tests.unit.machine import ram_file

__all__ = ["Monitor", "RunningMachine", "eventually", "run_script"]

SOURCE = Path(__file__).parent / "programs" / "machine.c"
ROOT = Path(__file__).parents[2]
RAM_BYTES = 4 << 20


class Monitor:
    """The part of QMP that a holder uses."""

    def __init__(self, pid: int) -> None:
        self.qemu_pid = pid

    def status(self) -> str:
        return "running"


class RunningMachine:
    """A machine that runs.

    Args:
        directory: where its RAM file is put.
        options: of `machine.c`.
        threads: how many.
        parent: a Python program that starts the command that is its arguments.
        terminal: a terminal that becomes its controlling one.
    """

    def __init__(
        self,
        directory: Path,
        *options: str,
        threads: int = 2,
        parent: str = "",
        terminal: int | None = None,
    ) -> None:
        program = build_workload(SOURCE, "-std=gnu11", "-pthread")
        self.path = directory / "ram"
        self.path.write_bytes(bytes(RAM_BYTES))
        command = [str(program), str(self.path), str(threads), *options]
        if parent:
            command = [sys.executable, "-c", parent, *command]
        if terminal is not None:
            command = ["setsid", "--ctty", *command]
        self.process = subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.pid = self.process.pid
        if parent:
            (self.pid,) = self._children()
        with self.path.open("rb") as file:
            self._ram = mmap.mmap(file.fileno(), 8192, access=mmap.ACCESS_READ)

    @property
    def slot(self) -> Slot:
        return Slot(Gpa(0), RAM_BYTES, ram_file(self.path), Offset(0))

    @property
    def counters(self) -> bytes:
        """The counters of its threads, which change while it runs."""
        return self._ram[4096:8192]

    @property
    def signals(self) -> int:
        return int.from_bytes(self._ram[:8], "little")

    @property
    def runs(self) -> bool:
        """Whether it runs now, or goes on to do so."""
        before = self.counters
        return eventually(lambda: self.counters != before, 5.0)

    def states(self) -> set[str]:
        found = set()
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                text = (thread / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            found.add(text.rpartition(") ")[2][0])
        return found

    def _children(self) -> list[int]:
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    def close(self) -> None:
        # The machine before its parent, which ends when the machine does.
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, 9)
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._ram.close()


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it comes to that."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


PRELUDE = """
import os, signal, sys, time
from ovr.errors import OvrError
from ovr.memory.ram import GuestRam
from ovr.vm import hold
from ovr.vm.hold import Holder
from tests.unit.machine_process import Monitor, eventually
pid = int(sys.argv[1])
"""


def run_script(
    script: str, *arguments: object, prefix: Sequence[str] = (), **options: object
) -> "subprocess.Popen[str]":
    """Start a Python program that holds; its first argument is the machine's pid."""
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [*prefix, sys.executable, "-c", PRELUDE + script, *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True,
        **{"stderr": subprocess.PIPE, **options},
    )  # fmt: skip
