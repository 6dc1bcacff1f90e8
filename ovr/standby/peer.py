"""Traits that client and standby process must share, for the one to do the work of the other.

State that a forked child can take over (`child.become`) may differ. Imports little: each restore
waits for it.
"""

import os
import resource
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

__all__ = ["circumstances", "difference", "rights", "status_of"]

_RIGHTS: Final = (
    "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs",
    "Seccomp", "Seccomp_filters",
)  # fmt: skip
_CIRCUMSTANCES: Final = ("Cpus_allowed", "Mems_allowed")


def rights(pid: int) -> Mapping[str, object]:
    """Return identity, rights, root directory and namespaces of the process `pid`, by name.

    Raises:
        OSError: there is no such process, or it may not be read.
    """
    process = f"/proc/{pid}"
    status = status_of(pid)
    found: dict[str, object] = {name: status.get(name) for name in _RIGHTS}
    for name in sorted(os.listdir(f"{process}/ns")):  # noqa: PTH208 - imports little
        found[f"{name} namespace"] = os.readlink(f"{process}/ns/{name}")  # noqa: PTH115
    root = os.stat(f"{process}/root")  # noqa: PTH116
    found["root directory"] = root.st_dev, root.st_ino
    with suppress(OSError):  # no security module
        found["security label"] = _read(f"{process}/attr/current")
    return found


def circumstances(pid: int) -> Mapping[str, object]:
    """Return the limits of the process `pid`, and its share of the CPUs, by name.

    Without its cgroup and its session: the work is charged to those of ``ovr warm``.

    Raises:
        OSError: there is no such process, or it must not be looked at.
    """
    status = status_of(pid)
    found: dict[str, object] = {name: status.get(name) for name in _CIRCUMSTANCES}
    for name in (name for name in dir(resource) if name.startswith("RLIMIT_")):
        found[name] = resource.prlimit(pid, getattr(resource, name))
    found["nice value"] = os.getpriority(os.PRIO_PROCESS, pid)
    found["scheduling policy"] = os.sched_getscheduler(pid)
    found["oom_score_adj"] = _read(f"/proc/{pid}/oom_score_adj")
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
    lines = _read(f"/proc/{pid}/status").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _read(path: str) -> str:
    with open(path, errors="surrogateescape") as file:  # noqa: PTH123 - imports little
        return file.read()
