"""The tree that is restored under stress, under fire and a thousand times over (`subject.c`).

It checks itself, and each of its tasks leaves a mark as the first thing that it does.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ovr import lab
from ovr.lab import demo
from ovr.lab.agent import LabAgent
from ovr.lab.cache import digest
from ovr.lab.share import SHARE
from ovr.lab.workload import build_workload

__all__ = [
    "HERE", "MARKS", "Answer", "Images", "ask", "build", "dump", "dump_in_a_vm", "end",
    "forget_marks", "install", "kill", "look", "marks", "must", "pages", "start",
]  # fmt: skip

HERE = Path(__file__).parent
DIRECTORY = "/tmp/ovr-subject"  # as in pattern.h
PROGRAM = "/usr/local/bin/ovr-subject"
LOOK = "/usr/local/bin/ovr-look"
MARKS = frozenset({"main", "thread", "child"})
PID = 21_000  # no freshly booted guest has given it away
PATIENCE = 240.0  # seconds; a guest under TCG with all that noise is slow


@dataclass(frozen=True)
class Answer:
    """The result of both processes: pages checked, pages wrong, the first wrong one."""

    pages: int
    wrong: int
    first: str


@dataclass(frozen=True)
class Images:
    """A dump on the host."""

    path: Path
    pid: int
    size: int

    def checksums(self) -> dict[str, str]:
        """Return a checksum of each file."""
        files = sorted(self.path.iterdir())
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def build(source: Path) -> Path:
    """Compile a program that uses the headers of this directory."""
    content = digest(*(header.read_bytes() for header in sorted(HERE.glob("*.h"))))
    return build_workload(source, "-std=gnu11", "-pthread", f"-I{HERE}", f"-DCOMMON={content}")


def install(vm: lab.LabVm) -> None:
    """Give the guest all that it needs to start or restore it."""
    vm.put(build(HERE / "subject.c"), PROGRAM, 0o755)
    vm.put(build(HERE / "look.c"), LOOK, 0o755)
    must(vm, f"mkdir -p {DIRECTORY}")


def start(vm: lab.LabVm, size: int, *words: str) -> int:
    """Start it, and return its pid once all is set up."""
    must(vm, f"echo {PID - 1} > /proc/sys/kernel/ns_last_pid")
    with vm.connect() as agent:
        agent.spawn([PROGRAM, str(size), *words])
    return int(_wait_for(vm, [f"{DIRECTORY}/pid"])[0])


def dump(vm: lab.LabVm, pid: int, directory: str = SHARE) -> None:
    """Have CRIU dump the tree, which ends it."""
    must(vm, f"criu dump -t {pid} -D {directory} -v2 -o dump.log && sync", timeout=600)


def dump_in_a_vm(
    name: str, path: Path, size: int, *words: str, suite: str = "trixie", memory: str = "1G"
) -> Images:
    """Boot a VM, start the tree in it, and dump it into a directory of the host."""
    with demo.lab_vm(name, suite=suite, memory=memory, share=path) as vm:
        install(vm)
        pid = start(vm, size, *words)
        dump(vm, pid)
    return Images(path, pid, size)


def ask(vm: lab.LabVm) -> Answer:
    """Have both processes check all of their memory."""
    both = ("main", "child")
    asked, answers = ([f"{DIRECTORY}/{what}-{who}" for who in both] for what in ("ask", "answer"))
    # No shell: under TCG on a busy host every process counts.
    with vm.connect() as agent:
        agent.run(["/bin/rm", "-f", *answers])
        agent.run(["/bin/touch", *asked])
    said = [json.loads(text) for text in _wait_for(vm, answers, processes=len(both))]
    first = next((one["first"] for one in said if one["first"]), "")
    return Answer(sum(one["pages"] for one in said), sum(one["wrong"] for one in said), first)


def pages(size: int) -> int:
    """How many pages an answer is about."""
    part = size // 16 // 4096
    return size // 4096 + 2 * part  # both look at what they share


def look(vm: lab.LabVm) -> dict[str, int]:
    """How many there are of this and that: see `look.c`."""
    with vm.connect() as agent:
        lines = _run(agent, LOOK).splitlines()
    return {name: int(count) for name, count in (line.rsplit(" ", 1) for line in lines)}


def marks(seen: Mapping[str, int]) -> set[str]:
    """Which tasks ran since the last `end`, as a look has seen it."""
    return {mark for mark in MARKS if seen[f"mark-{mark}"]}


def forget_marks(vm: lab.LabVm) -> None:
    """Remove the marks: who makes its mark again, runs."""
    with vm.connect() as agent:
        agent.run(["/bin/rm", "-f", *(f"{DIRECTORY}/{mark}" for mark in sorted(MARKS))])


def kill(agent: LabAgent, victim: str) -> bool:
    """Kill a victim that `look.c` knows; False if there is none."""
    return "killed" in _run(agent, LOOK, "kill", victim)


def end(vm: lab.LabVm) -> None:
    """Kill all of it, wait until it is gone, and take the marks away."""
    with vm.connect() as agent:
        _run(agent, LOOK, "end")


def _run(agent: LabAgent, *command: str) -> str:
    done = agent.run(command, timeout=PATIENCE)
    assert done.status == 0, f"{command}: {done}"
    return done.stdout.decode()


def must(vm: lab.LabVm, command: str, timeout: float = PATIENCE) -> str:
    """Run a shell command that has to succeed; returns what it says."""
    done = vm.sh(command, timeout=timeout)
    if done.status:
        raise AssertionError(f"{command}: {(done.stdout + done.stderr).decode(errors='replace')}")
    return done.stdout.decode(errors="replace")


def _wait_for(vm: lab.LabVm, paths: Sequence[str], processes: int = 0) -> list[str]:
    # The lines of files, once all are there, as long as there are so many processes.
    deadline = time.monotonic() + PATIENCE
    with vm.connect() as agent:
        while time.monotonic() < deadline:
            done = agent.run(["/bin/cat", *paths])
            if done.status == 0:
                return done.stdout.decode().splitlines()
            alive = agent.run(["/usr/bin/pgrep", "-c", "-r", "RSD", "-x", "ovr-subject"])
            assert int(alive.stdout) >= processes, "a process of the tree has died"
            time.sleep(0.1)
    raise AssertionError(f"no {', '.join(paths)} in {vm.name}")
