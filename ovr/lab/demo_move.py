"""Move a process that runs and writes from one lab VM to another, and let it check itself.

The process tells its longest pause by its own clock, which is VM A's before and VM B's after it.
Both clocks are compared with that of the host.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ovr import lab
from ovr.api import attach
from ovr.errors import LabError, VerifyMismatch
from ovr.lab.accel import Accel
from ovr.lab.demo import Answer, answer_of, lab_vm, prepare, start_workload
from ovr.move import MoveReport

__all__ = ["Clock", "MoveDemo", "clock_of", "pause_of", "run", "set_clock"]

_LOOKS: Final = 20
_SETTLE_SECONDS: Final = 1.0


class Clock(NamedTuple):
    """A guest's clock.

    Attributes:
        ahead: seconds that it is ahead of the host's.
        error: by how much that may be wrong.
    """

    ahead: float
    error: float


@dataclass(frozen=True)
class MoveDemo:
    """The outcome.

    Attributes:
        report: the report of the move.
        answer: the process's self-check.
        gap: seconds of its longest pause, by its own clocks.
        gap_error: by how much that may be wrong.
        size: its memory, in bytes.
        umask: its umask.
    """

    report: MoveReport
    answer: Answer
    gap: float
    gap_error: float
    size: int
    umask: int

    @property
    def verified(self) -> bool:
        """Whether the process found all of its memory and its umask correct, and has written."""
        return self.answer.right(self.size, self.umask) and self.answer.written > 0

    def as_json(self) -> dict[str, Any]:
        """Return the fields of ``ovr.demo.move/1``."""
        return {
            "verified": self.verified,
            "umask": self.answer.umask,
            "words": self.answer.words,
            "wrong": self.answer.wrong,
            "written": self.answer.written,
            "gap": round(self.gap, 6),
            "gap_error": round(self.gap_error, 6),
            **self.report.as_json(),
        }


def run(
    *,
    size: int = 1 << 30,
    memory: str = "4G",
    umask: int = 0o137,
    rate: int = 50,
    suite: str = "trixie",
    accel: Accel = "auto",
    verify: str = "sample",
    say: Callable[[str], None] = lambda _: None,
) -> MoveDemo:
    """Run the demo and return its outcome; the VMs are gone afterwards.

    Args:
        size: the process's memory, in bytes.
        memory: RAM of each VM.
        umask: of the process.
        rate: MiB of pages that it writes to in a second.
        suite: Debian release of the guests.
        accel: how QEMU runs them.
        verify: how the move verifies memory.
        say: called with a line of text before each step.

    Raises:
        OvrError: a step failed.
        VerifyMismatch: the process runs, but finds its memory or umask wrong.
    """
    hardware = {"suite": suite, "memory": memory, "accel": accel}
    say("booting VM A and VM B (the first time, their image is made first)")
    with lab_vm("demo-a", **hardware) as source, lab_vm("demo-b", **hardware) as target:
        prepare(target)
        set_clock(target)
        say(f"VM A: a process fills {size >> 20} MiB, and goes on writing {rate} MiB/s")
        pid = start_workload(source, size, umask, rate)
        time.sleep(_SETTLE_SECONDS)
        say("moving it from outside")
        with attach(f"lab:{source.name}") as vm, attach(f"lab:{target.name}") as other:
            report = vm.move(pid, other, verify=verify)
        time.sleep(_SETTLE_SECONDS)
        say("VM B: the process checks itself")
        answer = answer_of(target, pid)
        clocks = clock_of(source), clock_of(target)
    demo = MoveDemo(report, answer, *pause_of(answer, *clocks), size, umask)
    if not demo.verified:
        raise VerifyMismatch(f"the moved process reports: {answer}")
    return demo


def pause_of(answer: Answer, before: Clock, after: Clock) -> tuple[float, float]:
    """Return the longest pause of a moved process, and by how much that may be wrong, in seconds.

    Args:
        answer: of the process.
        before: the clock of the VM that it came from.
        after: the clock of the VM that it is in.
    """
    gap = (answer.after - after.ahead) - (answer.before - before.ahead)
    return gap, before.error + after.error


def clock_of(vm: lab.LabVm) -> Clock:
    """Compare a guest's clock with the host's."""
    best = Clock(0.0, float("inf"))
    with vm.connect() as agent:
        for _ in range(_LOOKS):
            before = time.time()
            done = agent.run(["date", "+%s.%N"])
            after = time.time()
            if done.status:
                raise LabError(f"date failed in lab VM {vm.name}")
            if (after - before) / 2 < best.error:
                middle = (before + after) / 2
                best = Clock(float(done.stdout) - middle, (after - before) / 2)
    return best


def set_clock(vm: lab.LabVm) -> None:
    """Set a guest's clock to the host's.

    The process takes the longest time between two looks at its clock for its longest pause: after
    the move, the clock must not be far behind.
    """
    with vm.connect() as agent:
        agent.run(["date", "-s", f"@{time.time():.3f}"])
