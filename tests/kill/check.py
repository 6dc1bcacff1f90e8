"""Checks after any victim was killed in a restore or dump."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import ovr
from ovr import lab
from ovr.errors import AgentUnreachable
from tests import subject
from tests.kill.attempt import TRACER, Attempt, name_of

__all__ = [
    "after", "host_is_clean", "is_quiet", "next_restore", "no_files", "not_held", "once_quiet",
    "restored", "runs_on", "said", "wait_for",
]  # fmt: skip

PATIENCE = 30.0


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until the condition holds, or raise."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def after(vm: lab.LabVm, victim: str, attempt: Attempt, scratch: Path) -> str:
    """Check the host, the guest and the tree; returns what became of the tree."""
    last = said(victim, attempt)
    host_is_clean(vm, scratch)
    if victim == "qemu":
        assert last.startswith("failed ") or attempt.events[-1].name == "end of commit", last
        return last
    return fate(vm, victim, attempt, last, once_quiet(vm))


def said(victim: str, attempt: Attempt) -> str:
    """Return what it said at last, or "killed"."""
    assert "Traceback" not in attempt.errors, attempt.errors
    if victim in ("ovr", "all") and attempt.process.returncode == -9:
        return "killed"
    assert attempt.last, (
        f"it ended with {attempt.process.returncode} and said nothing: {attempt.errors}"
    )
    return attempt.last


def host_is_clean(vm: lab.LabVm, scratch: Path) -> None:
    """Check that nothing holds the VM, if there is one, and that no temporary files are left."""
    not_held(vm)
    no_files(scratch)


def no_files(scratch: Path) -> None:
    """Check that no temporary files are left."""
    assert not list(scratch.iterdir()), f"temporary files are left: {list(scratch.iterdir())}"


def not_held(vm: lab.LabVm) -> None:
    """Check that nothing holds the VM, if there is one."""
    wait_for(lambda: not tracers(vm.name), "what held the VM is left")
    # A tracer that is killed has no command line before the kernel lets go what it holds.
    wait_for(lambda: not vm.alive or state_of(vm.pid) not in "tT", "the VM is held")


def fate(vm: lab.LabVm, victim: str, attempt: Attempt, said: str, seen: Mapping[str, int]) -> str:
    """Tell what became of the tree: all of it runs and is right, or nothing of it is there.

    Unless "go" was said nothing of it may ever have run. After that a task may have run before it,
    or CRIU, was killed; it must have been whole then.
    """
    marks, alive = subject.marks(seen), seen["subjects"]
    if said == "done" and victim not in ("root", "task"):
        assert alive == 2, f"{alive} processes run"
    if not attempt.said_go:
        assert said != "done"
        assert not marks, f"{marks} ran"
    if alive == 2:
        assert attempt.said_go
        restored(vm)
        return "runs"
    if victim not in ("root", "task"):
        assert not alive, f"{alive} processes of the tree are left"
        assert not marks or victim == "criu", f"{marks} ran, and are gone"
    return "ran in part" if marks else "gone"


def restored(vm: lab.LabVm, size: int = 0) -> None:
    """Check that all of the tree runs and is right."""
    answer = subject.ask(vm)
    assert answer.wrong == 0, answer
    assert not size or answer.pages == subject.pages(size), answer
    wait_for(
        lambda: subject.marks(subject.look(vm)) == subject.MARKS, "a task of the tree does not run"
    )


def runs_on(vm: lab.LabVm) -> None:
    """Check that all of the tree runs, from now on, and that its memory is right."""
    subject.forget_marks(vm)
    restored(vm)


def next_restore(vm: lab.LabVm, images: subject.Images) -> None:
    """Restore as if nothing had happened."""
    subject.end(vm)
    with ovr.attach(f"lab:{vm.name}") as attached:
        assert attached.qmp.status() == "running"
        attached.restore(images.path, verify="full")
    restored(vm, images.size)
    subject.end(vm)


def once_quiet(vm: lab.LabVm) -> dict[str, int]:
    """Wait until the agent is there, no restore is under way and nobody is held; return a look."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            seen = subject.look(vm)
        except AgentUnreachable:
            seen = {}
        if seen and is_quiet(seen):
            return seen
        assert time.monotonic() < deadline, f"something of the restore is left in the guest: {seen}"
        time.sleep(0.1)


def is_quiet(seen: Mapping[str, int]) -> bool:
    """Whether a look found an agent, and nothing of a restore, dump or move."""
    left = seen["criu"] + seen["restores"] + seen["held"] + seen["cgroups"]
    return not left and seen["agents"] == 1


def state_of(pid: int) -> str:
    """The state of a process of the host."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def tracers(name: str) -> list[int]:
    """Processes that hold that lab VM for an `ovr`: forked from it, they have its command line."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and name_of(int(directory.name)) == TRACER:
            with suppress(OSError):
                words = (directory / "cmdline").read_bytes().split(b"\0")
                if f"lab:{name}".encode() in words:
                    found.append(int(directory.name))
    return found
