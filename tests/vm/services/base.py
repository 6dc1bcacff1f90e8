"""Shared by the real services: a place, a root process, questions, an end.

Every service lives in one directory of the guest, runs under one root process, and is asked by a
client that runs in the guest too (`guest/NAME.py`, with the guest's own Python).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ovr import lab

GUEST = Path(__file__).parent / "guest"
"""Programs for the guest: clients, and services that are programs of ours."""

# A stopped process does not fork: once no new one is found, all are stopped.
_END = """
    tree() {
        test -d /proc/$1 && echo $1
        for child in $(cat /proc/$1/task/*/children 2>/dev/null); do tree $child; done
    }
    root=$(cat $1/root.pid) || exit 0
    found=
    while all=$(tree $root); test "$all" != "$found"; do
        kill -STOP $all 2>/dev/null
        found=$all
    done
    kill -KILL $found 2>/dev/null
    for pid in $found; do
        while test -d /proc/$pid; do sleep 0.05; done
    done
"""


class Service(ABC):
    """A service of the guest's distribution, from its start to its end.

    Attributes:
        name: its name, of its directory too.
        first_pid: its pids begin about here; no freshly booted guest has given them away.
        dump_options: what CRIU needs to dump it.
        restore_options: what CRIU needs to restore it.
    """

    name: ClassVar[str]
    first_pid: ClassVar[int]
    dump_options: ClassVar[tuple[str, ...]] = ()
    restore_options: ClassVar[tuple[str, ...]] = ()

    @property
    def directory(self) -> str:
        """Where the guest has all files that the service writes."""
        return f"/srv/{self.name}"

    @property
    def carry(self) -> tuple[str, ...]:
        """Directories that a restore needs as they were at the dump: CRIU compares sizes."""
        return (self.directory,)

    def prepare(self, vm: lab.LabVm) -> None:
        """Make a fresh VM ready to start the service, or to unpack and restore it."""
        run(vm, f"rm -rf {self.directory} && mkdir -p {self.directory}")

    @abstractmethod
    def start(self, vm: lab.LabVm) -> int:
        """Start the service in a prepared VM, load its data, and return its root pid."""

    @abstractmethod
    def check(self, vm: lab.LabVm) -> None:
        """Ask for what it knew at the dump, and have it go on working.

        Raises:
            AssertionError: an answer is wrong; the message has it.
        """

    def end(self, vm: lab.LabVm) -> None:
        """Kill the whole tree, if there is one, and wait until its pids are free."""
        done = vm.sh(f"set -- {self.directory}\n{_END}", timeout=120)
        assert done.status == 0, done.stderr.decode(errors="replace")

    def launch(self, vm: lab.LabVm, command: Sequence[str]) -> int:
        """Start the root process: a session of its own, no terminal, nothing to read."""
        run(vm, f"echo {self.first_pid - 1} > /proc/sys/kernel/ns_last_pid")
        with vm.connect() as agent:
            pid = agent.spawn(command)
        run(vm, f"echo {pid} > {self.directory}/root.pid")
        return pid

    def ask(self, vm: lab.LabVm, *arguments: str, timeout: float = 300.0) -> str:
        """Run the service's client in the guest and return what it prints.

        Raises:
            AssertionError: it fails; the message is the client's.
        """
        program = (GUEST / f"{self.name}.py").read_bytes()
        return run(vm, f"python3 - {' '.join(arguments)}", program, timeout)


def run(vm: lab.LabVm, command: str, input: bytes = b"", timeout: float = 60.0) -> str:
    """Run a shell command in the guest, which must succeed, and return its output."""
    done = vm.sh(command, input=input, timeout=timeout)
    trouble = (done.stderr or done.stdout).decode(errors="replace")[-4000:]
    assert done.status == 0, f"{command} in {vm.name} ({done.status}): {trouble}"
    return done.stdout.decode()


def put(vm: lab.LabVm, service: Service, *names: str) -> None:
    """Copy programs for the guest into the service's directory."""
    for name in names:
        vm.put(GUEST / name, f"{service.directory}/{name}", 0o755)
