"""Processes in the VM of the benchmarks: started, dumped, restored by CRIU, checked, ended.

The images that CRIU restores from inside are on a tmpfs of the guest: in memory whatever happens,
nothing to be read from a disk, and reading them is a copy from the page cache as it is for any
file. The same images are on the host, for `ovr`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.race import Measures
from ovr.lab import LabVm, demo
from ovr.lab.share import SHARE
from ovr.lab.workload import build_workload

PROGRAMS = Path(__file__).parent / "programs"
IMAGES = "/images"
SHAPES = "/var/lib/bench-shape"
PID = 20_000
UMASK = 0o137
COMPUTE, MEMORY, MEMORY_BYTES = 2, 2, 32 << 20
"""The load of each vCPU: processes that compute, that move memory, and how much they move."""
PATIENCE = 900.0


def memory_for(size: int) -> int:
    """Return how much memory a VM needs for a process of `size` bytes and its images."""
    needed = max(2 * size + size // 16 + (768 << 20), 1 << 30)
    return -(-needed // (2 << 20)) * (2 << 20)


@dataclass(frozen=True)
class Subject:
    """A dumped tree that can be restored.

    Attributes:
        name: unique among the subjects of a VM.
        size: bytes of its memory, all processes together.
        program: its name in the guest.
        pid: of the root.
        images: on the host.
    """

    name: str
    size: int
    program: str
    pid: int
    images: Path

    @property
    def inside(self) -> str:
        """Where the guest has the images."""
        return f"{IMAGES}/{self.name}"


class Guest:
    """The VM.

    Args:
        vm: a lab VM.
        share: the host's directory that it has at `SHARE`.
    """

    def __init__(self, vm: LabVm, share: Path) -> None:
        self.vm = vm
        self._share = share
        demo.prepare(vm)
        for name in ("load", "fragment", "shape"):
            program = build_workload(PROGRAMS / f"{name}.c", "-std=gnu11")
            vm.put(program, f"/usr/local/bin/bench-{name}", 0o755)
        self.sh(f"mkdir -p {IMAGES} {SHAPES} && mount -t tmpfs -o size=95% images {IMAGES}")

    def sh(self, command: str) -> str:
        """Run a command that must succeed, and return its output."""
        done = self.vm.sh(command, timeout=PATIENCE)
        assert done.status == 0, f"{command}: {done.stderr.decode(errors='replace')}"
        return done.stdout.decode()

    def workload(self, size: int) -> Subject:
        """Dump a process with one area of `size` bytes."""
        pid = demo.start_workload(self.vm, size, UMASK)
        return self._dump(f"workload-{size >> 20}M", size, "ovr-workload", pid)

    def shape(self, kind: str, count: int, size: int) -> Subject:
        """Dump a process with `count` ``areas``, or a ``tree`` of so many processes."""
        self.sh(f"rm -f {SHAPES}/ready; echo {PID - 1} > /proc/sys/kernel/ns_last_pid")
        with self.vm.connect() as agent:
            agent.spawn(["/usr/local/bin/bench-shape", SHAPES, kind, str(size), str(count)])
        pid = int(self._await(f"{SHAPES}/ready"))
        return self._dump(f"{kind}-{count}", size, "bench-shape", pid)

    def forget(self, subject: Subject) -> None:
        """Remove the images from the guest."""
        self.sh(f"rm -rf {subject.inside}")

    def clear(self, subject: Subject) -> None:
        """End the restored tree and wait until its memory is free again."""
        name = subject.program
        self.sh(f"pkill -9 -x {name}; while pgrep -x {name} >/dev/null; do sleep 0.05; done")

    def restore(self, subject: Subject) -> Measures:
        """Have the guest's CRIU restore it."""
        command = ["criu", "restore", "-d", "-D", subject.inside, "-o", "/tmp/restore.log"]
        with self.vm.connect() as agent:
            start = time.perf_counter()
            done = agent.run(command, timeout=PATIENCE)
            seconds = time.perf_counter() - start
        assert done.status == 0, done.stderr.decode(errors="replace")
        return {"seconds": seconds}

    def check(self, subject: Subject) -> None:
        """Have the restored tree check all of its memory."""
        if subject.program == "ovr-workload":
            answer = demo.answer_of(self.vm, subject.pid)
            assert (answer.words, answer.wrong) == (subject.size // 8, 0)
            return
        self.sh(f"rm -f {SHAPES}/answer && kill -USR1 {subject.pid}")
        assert int(self._await(f"{SHAPES}/answer")) == 0

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Oversubscribe every vCPU for the body of the ``with``."""
        arguments = [str(COMPUTE), str(MEMORY), str(MEMORY_BYTES)]
        with self.vm.connect() as agent:
            agent.spawn(["/usr/local/bin/bench-load", *arguments])
        processes = self.vm.hardware.cpus * (COMPUTE + MEMORY) + 1
        self.sh(f"until [ $(pgrep -cx bench-load) = {processes} ]; do sleep 0.1; done; sleep 1")
        try:
            yield
            assert int(self.sh("pgrep -cx bench-load")) == processes
        finally:
            self.sh(
                "pkill -9 -x bench-load; while pgrep -x bench-load >/dev/null; do sleep 0.1; done"
            )

    @contextmanager
    def fragmented(self, size: int) -> Iterator[None]:
        """Leave the guest single, scattered pages only, `size` bytes of them and some more."""
        never = "echo never > /sys/kernel/mm/transparent_hugepage/enabled"
        calm = "echo 0 > /proc/sys/vm/compaction_proactiveness"
        self.sh(f"{never}; {calm}; echo 3 > /proc/sys/vm/drop_caches; rm -f /tmp/fragmented")
        room = size + size // 64 + (32 << 20)  # page tables too
        command = ["/usr/local/bin/bench-fragment", str(room), str(192 << 20), "/tmp/fragmented"]
        with self.vm.connect() as agent:
            agent.spawn(command, output="/tmp/fragment.log")
        look = "[ -e /tmp/fragmented ] || ! pgrep -x bench-fragment >/dev/null"
        self.sh(
            f"until {look}; do sleep 0.2; done; cat /tmp/fragment.log >&2; [ -e /tmp/fragmented ]"
        )
        try:
            yield
        finally:
            gone = "while pgrep -x bench-fragment >/dev/null; do sleep 0.1; done"
            self.sh(f"pkill -9 -x bench-fragment; {gone}")
            self.sh("echo always > /sys/kernel/mm/transparent_hugepage/enabled")

    def _dump(self, name: str, size: int, program: str, pid: int) -> Subject:
        subject = Subject(name, size, program, pid, self._share / name)
        self.sh(f"mkdir -p {subject.inside} {SHARE}/{name}")
        demo.dump_workload(self.vm, pid, subject.inside)
        self.clear(subject)
        self.sh(f"cp {subject.inside}/* {SHARE}/{name}/ && sync")
        return subject

    def _await(self, path: str) -> str:
        return self.sh(f"until [ -e {path} ]; do sleep 0.2; done; cat {path}")


def warm_cache(images: Path) -> None:
    """Have the host's page cache hold the images."""
    for path in images.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass
