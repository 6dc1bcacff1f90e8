"""Dump from lab VM A, restore into lab VM B, self-check.

Both are done from outside; or the dump alone, and VM B's own CRIU restores the process without ovr.

The process checks itself: it recomputes every word of its memory and reads its umask from within
(`lab/workload.c`). This module does not inspect it.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ovr import lab
from ovr.api import attach
from ovr.dump.report import DumpReport
from ovr.errors import LabError, VerifyMismatch
from ovr.lab.accel import Accel
from ovr.lab.cache import cache_directory
from ovr.lab.share import SHARE
from ovr.lab.workload import build_workload
from ovr.restore.report import Report

__all__ = ["DUMP_OPTIONS", "Answer", "Demo", "answer_of", "dump_workload", "lab_vm", "run"]

LEAST_OUTSIDE: Final = 0.999
"""Least part of the page bytes that the dump must read from outside, for a process of 1 GiB."""
DUMP_OPTIONS: Final = ("-v2", "--log-file", "dump.log")
_PROGRAM: Final = "/usr/local/bin/ovr-workload"
_DIRECTORY: Final = "/var/lib/ovr-workload"
_PID: Final = 20_000


@dataclass(frozen=True)
class Answer:
    """Result of the workload's self-check.

    Attributes:
        pid: its pid.
        words: words that it has checked.
        wrong: of those, wrong ones.
        first_wrong: index of the first of them; -1 if there is none.
        umask: its umask.
        written: pages that it has written to since its start.
        before: when it ran for the last time before its longest pause, in seconds of its clock.
        after: when it ran again.
    """

    pid: int
    words: int
    wrong: int
    first_wrong: int
    umask: str
    written: int = 0
    before: float = 0.0
    after: float = 0.0

    def right(self, size: int, umask: int) -> bool:
        """Tell whether it found all of its memory, `size` bytes, and its umask correct."""
        words = self.wrong == 0 and self.words == size // 8
        return words and int(self.umask, 8) == umask


@dataclass(frozen=True)
class Demo:
    """The outcome.

    Attributes:
        dumped: the report of the dump.
        report: that of the restore; None if VM B's own CRIU has restored the process.
        answer: the process's self-check.
        size: its memory, in bytes.
        umask: its umask.
    """

    dumped: DumpReport
    report: Report | None
    answer: Answer
    size: int
    umask: int

    @property
    def verified(self) -> bool:
        """Whether the process found all of its memory and its umask correct."""
        return self.answer.right(self.size, self.umask)

    def as_json(self) -> dict[str, Any]:
        """Return the fields of ``ovr.demo/1``, or of ``ovr.demo.dump/1``."""
        checked = {
            "verified": self.verified,
            "umask": self.answer.umask,
            "words": self.answer.words,
            "wrong": self.answer.wrong,
        }
        if self.report is None:
            return {**checked, **self.dumped.as_json()}
        return {**checked, **self.report.as_json(), "dump": self.dumped.as_json()}


def run(
    *,
    size: int = 1 << 30,
    memory: str = "4G",
    umask: int = 0o137,
    suite: str = "trixie",
    accel: Accel = "auto",
    verify: str = "sample",
    by_criu: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Demo:
    """Run the demo and return its outcome; the VMs are gone afterwards.

    Args:
        size: the process's memory, in bytes.
        memory: RAM of each VM.
        umask: of the process.
        suite: Debian release of the guests.
        accel: how QEMU runs them.
        verify: how dump and restore verify memory.
        by_criu: VM B's own CRIU restores the images, without ovr.
        say: called with a line of text before each step.

    Raises:
        OvrError: a step failed.
        LabError: by CRIU: too little of the memory was read from outside.
        VerifyMismatch: the process runs, but finds its memory or umask wrong.
    """
    with tempfile.TemporaryDirectory(prefix="ovr-demo-", dir=cache_directory()) as scratch:
        images = Path(scratch)
        hardware = {"suite": suite, "memory": memory, "accel": accel}
        say("booting VM A (the first time, its image is made first)")
        with lab_vm("demo-a", **hardware) as source:
            say(f"VM A: a process fills {size >> 20} MiB with generated data")
            pid = start_workload(source, size, umask)
            say("VM A: dumping the process from outside")
            with attach(f"lab:{source.name}") as vm:
                dumped = vm.dump(pid, images, verify=verify)
        if by_criu:
            _check_outside(dumped)
        say("VM A is gone; booting VM B")
        with lab_vm("demo-b", **hardware, share=images if by_criu else None) as target:
            prepare(target)
            report = None
            if by_criu:
                say("VM B: its CRIU restores the process")
                _restore_by_criu(target)
            else:
                say("VM B: restoring the process from outside")
                with attach(f"lab:{target.name}") as vm:
                    report = vm.restore(images, verify=verify)
            say("VM B: the process checks itself")
            demo = Demo(dumped, report, answer_of(target, pid), size, umask)
    if not demo.verified:
        raise VerifyMismatch(f"the restored process reports: {demo.answer}")
    return demo


def _check_outside(dumped: DumpReport) -> None:
    share = dumped.bytes_outside / dumped.bytes_total
    if share < LEAST_OUTSIDE:
        raise LabError(
            f"only {share:.3%} of the page bytes were read from outside, not {LEAST_OUTSIDE:.1%}",
            "did something else write to the process's memory? try again",
        )


def _restore_by_criu(vm: lab.LabVm) -> None:
    done = vm.sh(f"criu restore -d -D {SHARE} -W /run -o restore.log -v2", timeout=600)
    if done.status:
        error = vm.sh("grep Error /run/restore.log | tail -n 1").stdout or done.stderr
        raise LabError(f"criu restore failed: {error.decode(errors='replace').strip()}")


@contextmanager
def lab_vm(name: str, **hardware: Any) -> Iterator[lab.LabVm]:
    """A lab VM for the body of the ``with``."""
    vm = lab.up(name, **hardware)
    try:
        yield vm
    finally:
        vm.down()


def prepare(vm: lab.LabVm) -> None:
    """Copy the workload's program into the guest, at the path where CRIU opens it."""
    vm.sh(f"mkdir -p {_DIRECTORY}")
    vm.put(build_workload(), _PROGRAM, 0o755)


def start_workload(vm: lab.LabVm, size: int, umask: int, rate: int | None = None) -> int:
    """Start the workload and return its pid once its memory is filled.

    Args:
        vm: starts it.
        size: bytes of its memory.
        umask: its umask.
        rate: MiB of pages that it writes to in a second; None: it waits.
    """
    prepare(vm)
    # An earlier writer of the file had the same pid, which no process of a freshly booted guest
    # has.
    vm.sh(f"rm -f {_DIRECTORY}/pid; echo {_PID - 1} > /proc/sys/kernel/ns_last_pid")
    with vm.connect() as agent:
        written = [] if rate is None else [str(rate)]
        agent.spawn([_PROGRAM, _DIRECTORY, str(size), f"{umask:o}", *written])
    return int(_await(vm, f"{_DIRECTORY}/pid"))


def dump_workload(vm: lab.LabVm, pid: int, directory: str = SHARE) -> None:
    """Have the guest's CRIU dump process `pid` into a directory of the guest, and end it."""
    command = f"criu dump -t {pid} -D {directory} {' '.join(DUMP_OPTIONS)} && sync"
    done = vm.sh(command, timeout=600)
    if done.status:
        tail = vm.sh(f"grep Error {directory}/dump.log | tail -n 1").stdout.decode(errors="replace")
        raise LabError(f"criu dump failed: {tail.strip() or done.stderr.decode(errors='replace')}")


def answer_of(vm: lab.LabVm, pid: int) -> Answer:
    """Let the workload check itself, and return its result."""
    vm.sh(f"rm -f {_DIRECTORY}/answer && kill -USR1 {pid}")
    return Answer(**json.loads(_await(vm, f"{_DIRECTORY}/answer")))


def _await(vm: lab.LabVm, path: str, patience: float = 300.0) -> str:
    deadline = time.monotonic() + patience
    with vm.connect() as agent:
        while time.monotonic() < deadline:
            done = agent.run(["cat", path])
            if done.status == 0:
                return done.stdout.decode()
            time.sleep(0.1)
    raise LabError(f"the workload in lab VM {vm.name} did not write {path}")
