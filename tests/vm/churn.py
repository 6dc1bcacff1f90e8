"""The program that changes its memory all the time (`programs/churn/churn.c`)."""

import time
from pathlib import Path
from typing import NamedTuple

from ovr import lab
from ovr.lab.workload import build_workload

DIRECTORY = "/var/lib/ovr-churn"
PROGRAM = "/usr/local/bin/ovr-churn"
PATIENCE = 120.0
PID = 21_000


class Answer(NamedTuple):
    """Its result about its own memory."""

    pages: int
    wrong: int
    steps: int


def install(vm: lab.LabVm) -> None:
    """Put its program where CRIU opens it."""
    source = Path(__file__).parent / "programs" / "churn" / "churn.c"
    vm.put(build_workload(source, "-std=gnu11", "-pthread"), PROGRAM, 0o755)
    vm.sh(f"mkdir -p {DIRECTORY}; echo 1 > /sys/kernel/mm/ksm/run")


def start(vm: lab.LabVm, seed: int) -> int:
    """Start it, and return its pid."""
    vm.sh(f"rm -f {DIRECTORY}/*; echo {PID - 1} > /proc/sys/kernel/ns_last_pid")
    with vm.connect() as agent:
        agent.spawn([PROGRAM, str(seed), DIRECTORY])
    return int(_await(vm, f"{DIRECTORY}/pid"))


def ask(vm: lab.LabVm, pid: int) -> Answer:
    """Have it check all of its pages."""
    vm.sh(f"rm -f {DIRECTORY}/answer; kill -USR1 {pid}")
    return Answer(*map(int, _await(vm, f"{DIRECTORY}/answer").split()))


def end(vm: lab.LabVm, pid: int) -> None:
    """End it and its children."""
    vm.sh(f"pkill -9 -x ovr-churn; while kill -0 {pid} 2>/dev/null; do sleep 0.1; done")


def _await(vm: lab.LabVm, path: str) -> str:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        done = vm.sh(f"cat {path}")
        if done.status == 0 and done.stdout:
            return done.stdout.decode()
        time.sleep(0.1)
    raise AssertionError(f"the guest has no {path}")
