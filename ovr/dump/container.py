"""Containers of an engine in the guest: what is dumped, and which process is their root."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from ovr.checkpoint import RUNTIMES, check_engine
from ovr.errors import AgentUnreachable, UsageError
from ovr.guest.client.agent import Agent
from ovr.guest.client.session import one_line

__all__ = ["PODMAN", "STDOUT", "Container", "Running", "check_name", "to_dump"]

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}")
_PID_MAX_LIMIT: Final = 1 << 22  # include/linux/threads.h
PODMAN: Final = "podman"
"""The engine that writes archives."""
STDOUT: Final = Path("-")
"""Stands for standard output in the place of an archive."""
_BOTH: Final = ("--tcp-established", "--file-locks")
"""Options of CRIU's that all engines have, too."""
_PASSED: Final = {
    PODMAN: ("--ignore-rootfs", "--ignore-volumes", "--keep"),
    "runc": ("--shell-job", "--ext-unix-sk", "--manage-cgroups-mode", "--empty-ns",
             "--tcp-skip-in-flight"),
    "crun": ("--shell-job", "--ext-unix-sk", "--manage-cgroups-mode"),
}  # fmt: skip
"""The engines' options that do not change where images go, or which."""


class Running(NamedTuple):
    """A tree that runs.

    Attributes:
        pid: its root process, in the guest's initial pid namespace.
        id: the engine's id of it; None: no container, only that process.
    """

    pid: int
    id: str | None = None


@dataclass(frozen=True)
class Container:
    """A container that is to be dumped.

    Attributes:
        engine: ``podman``, ``runc`` or ``crun``.
        name: its name or id.
        options: for the engine's ``checkpoint``.
    """

    engine: str
    name: str
    options: tuple[str, ...] = ()

    def find(self, agent: Agent) -> Running:
        """Ask the engine for the container.

        Raises:
            CheckFailed: the guest has no such engine, or no CRIU that can be used with it.
            UsageError: it has no such container, or one that does not run.
            AttemptFailed: the engine cannot be started.
            AgentUnreachable: the link broke, or the engine's answer is invalid.
        """
        check_engine(agent.hello, self.engine)
        found = agent.find(self.engine, self.name)
        if found.status:
            said = one_line(found.text) or f"status {found.status}"
            raise _coded(
                UsageError(
                    f"{self.engine} in the guest finds no container {self.name}: {said}",
                    f"{self.engine} {'ps' if self.engine == PODMAN else 'list'}, in the guest",
                ),
                "no-container",
            )
        return self._running(found.data)

    def _running(self, data: bytes) -> Running:
        try:
            known = json.loads(data)
            state = known["state"] if self.engine == PODMAN else known
            id_ = known["id"]
            status, pid = _field(state, "status"), _field(state, "pid")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._invalid() from error
        if not isinstance(status, str) or type(pid) is not int or not isinstance(id_, str):
            raise self._invalid()
        if status != "running":
            raise _coded(
                UsageError(
                    f"the container {self.name} is {one_line(status)}, not running",
                    f"start it in the guest: {self.engine} start {self.name}",
                ),
                "not-running",
            )
        if not 1 < pid < _PID_MAX_LIMIT or not _NAME.fullmatch(id_):
            raise self._invalid()
        return Running(pid, id_)

    def _invalid(self) -> AgentUnreachable:
        return AgentUnreachable(
            f"{self.engine} in the guest describes the container {self.name} in another way",
            f"is it a version of {self.engine} that docs/podman.md names?",
        )


def _field(state: Any, name: str) -> Any:
    # podman's names have capitals.
    return state[name] if name in state else state[name.capitalize()]


def to_dump(
    pid: int | None,
    images: str | Path | None,
    *,
    container: str | None,
    export: str | Path | None,
    runtime: str | None,
    criu_options: Sequence[str],
    engine_options: Sequence[str],
) -> tuple[int | Container, Path]:
    """Return the tree that is to be dumped, and its place; arguments as for `ovr.Vm.dump`.

    Raises:
        UsageError: not exactly one tree, not the place that it can go to, or as `_container_of`.
    """
    if (pid is None) == (container is None):
        raise UsageError(
            "either a process or a container can be dumped", "give -t PID or --container NAME"
        )
    if container is None:
        for stray, given in (("--export", export), ("--runtime", runtime), ("--", engine_options)):
            if given:
                raise UsageError(f"{stray} needs a container", "give --container NAME")
    else:
        found = _container_of(
            container, runtime=runtime, criu_options=criu_options, engine_options=engine_options
        )
        if runtime is None and (export is None or images is not None):
            raise UsageError(
                "a container of podman goes into an archive", "give --export FILE, and no -D"
            )
        if runtime is not None and export is not None:
            raise UsageError(f"{runtime} has no archives", "give -D DIR, or leave out --runtime")
        if export is not None:
            return found, Path(export)
    if images is None:
        raise UsageError("no place for the images", "give -D DIR")
    return (pid if pid is not None else found), Path(images)


def _container_of(
    name: str,
    *,
    runtime: str | None,
    criu_options: Sequence[str],
    engine_options: Sequence[str],
) -> Container:
    """Return the container that a user names.

    Args:
        name: its name or id.
        runtime: ``runc`` or ``crun``, which runs it without podman; None: it is podman's.
        criu_options: of these the engines have ``--tcp-established`` and ``--file-locks``.
        engine_options: further options for the engine's ``checkpoint``.

    Raises:
        UsageError: a name that no container has, an unknown runtime, an option that the engine does
            not take here.
    """
    engine = runtime or PODMAN
    if engine not in _PASSED or (runtime is not None and runtime not in RUNTIMES):
        raise UsageError(f"no container runtime {engine!r}", f"take {' or '.join(RUNTIMES)}")
    check_name(name)
    for option in criu_options:
        if option not in _BOTH:
            raise UsageError(
                f"{engine} runs CRIU itself: {option} cannot be passed on",
                f"give options of {engine} after --",
            )
    for option in engine_options:
        if option.partition("=")[0] not in _PASSED[engine]:
            raise UsageError(
                f"{engine}'s option {option} cannot be passed on",
                f"after -- may be {', '.join(_PASSED[engine])}; values as --option=value",
            )
    return Container(engine, name, (*criu_options, *engine_options))


def check_name(name: str) -> None:
    """Check that a container may have this name or id.

    Raises:
        UsageError: it may not.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} is not the name or id of a container", "see podman ps")


def _coded(error: UsageError, code: str) -> UsageError:
    error.code = code
    return error
