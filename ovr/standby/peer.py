"""Whether a process can do for another exactly what that would do itself.

What a forked child can take over (`child.become`) may differ. The rest must be the same.
"""

import os
import resource
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["difference", "status_of", "traits"]

_STATUS: Final = (
    "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs",
    "Seccomp", "Cpus_allowed", "Mems_allowed",
)  # fmt: skip
_LIMITS: Final = [name for name in dir(resource) if name.startswith("RLIMIT_")]


def traits(pid: int) -> Mapping[str, object]:
    """Return what a child cannot take over from the process `pid`, by name.

    That is who it is and what it may do, its namespaces and its root, its limits, and its share of
    the CPUs. Its cgroup and its session are not in it: what is done is charged to those of
    ``ovr warm``.

    Raises:
        OSError: there is no such process, or it must not be looked at.
    """
    process = Path("/proc", str(pid))
    status = status_of(pid)
    found: dict[str, object] = {name: status.get(name) for name in _STATUS}
    for namespace in (process / "ns").iterdir():
        found[f"{namespace.name} namespace"] = str(namespace.readlink())
    root = (process / "root").stat()
    found["root directory"] = root.st_dev, root.st_ino
    for name in _LIMITS:
        found[name] = resource.prlimit(pid, getattr(resource, name))
    found["nice value"] = os.getpriority(os.PRIO_PROCESS, pid)
    found["scheduling policy"] = os.sched_getscheduler(pid)
    found["oom_score_adj"] = (process / "oom_score_adj").read_text()
    with suppress(OSError):  # no security module
        found["security label"] = (process / "attr" / "current").read_text()
    return found


def difference(mine: Mapping[str, object], theirs: Mapping[str, object]) -> str | None:
    """Return the name of the first trait that differs, or None."""
    names = (name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name))
    return next(names, None)


def status_of(pid: int) -> Mapping[str, str]:
    """Return the lines of ``/proc/PID/status``, by name.

    Raises:
        OSError: there is no such process.
    """
    lines = Path("/proc", str(pid), "status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
