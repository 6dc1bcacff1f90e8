"""The agent in the guest, as a restore sees it."""

import collections.abc
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

from ovr.addresses import Gva
from ovr.errors import (
    AgentUnreachable,
    CriuFailed,
    ImagesUnsupported,
    PidTaken,
    RestoreFailed,
)
from ovr.guest import protocol
from ovr.guest.message import Message
from ovr.guest.wire import ProtocolError
from ovr.vm.lab_agent import Completed, LabSession
from ovr.vm.session import Hello, one_line

__all__ = ["Agent", "Completed", "Hello", "Mapping", "Restored", "Skeleton", "Warm"]

MessageT = TypeVar("MessageT", bound=Message)

_FILES_PER_FRAME = 512

Files = collections.abc.Mapping[str, bytes | Iterable[bytes]]
"""Contents by file name, whole or in pieces."""


@dataclass(frozen=True)
class Skeleton:
    """The stopped tree that CRIU holds; pids in the guest's initial pid namespace.

    Attributes:
        root_pid: the root task.
        criu_pid: CRIU, which traces all of them and is itself stopped.
        tasks: the ids of all held threads, leaders included.
        warm: how many bytes of areas were made from the pool; `note`: why none, or not all.
    """

    root_pid: int
    criu_pid: int
    tasks: tuple[int, ...]
    warm: int = 0
    note: str = ""


@dataclass(frozen=True)
class Restored:
    """The tree runs; `pid` is its root, `container` what the engine calls it."""

    pid: int
    container: str | None = None


@dataclass(frozen=True)
class Mapping:
    """A shared object in the memory of a process of the agent's; `pid` as for `Skeleton`."""

    pid: int
    address: Gva


@dataclass(frozen=True)
class Warm:
    """The pool.

    Attributes:
        size: in bytes; 0: there is none.
        huge: how many of them are in huge pages.
        pid: the process that has it, as for `Skeleton`.
        address: where it is there.
        note: why there is none.
    """

    size: int
    huge: int
    pid: int
    address: Gva
    note: str


class Agent(LabSession):
    """A restore, step by step: `prove`, `begin`, then `go` or `abort`.

    ::

        with Agent.connect("vsock:3") as agent:
            prove(kernel, agent)
            skeleton = agent.begin(images)
            with agent.keep_alive():
                ...  # write memory and state from outside
            agent.go()
    """

    _engine = "criu"

    def prove(self, secret: bytes) -> None:
        """Show that we can read the VM's RAM; `ovr.vm.proof` finds the secret there.

        The agent hangs up, with the reason, if it is wrong; what is asked of it next finds out.

        Raises:
            AgentUnreachable: the link broke.
        """
        self._send(protocol.Prove(secret))

    def begin(
        self,
        images: Files,
        *,
        criu_options: Sequence[str] = (),
        silence: float = 10.0,
        timeout: float = 60.0,
        log_level: int = 2,
        keep_log: bool = False,
        engine: str | None = None,
        volumes: Sequence[str] = (),
        warm_images: Sequence[str] = (),
    ) -> Skeleton:
        """Have the guest's CRIU build the tree from `images`, up to its pre-resume hook.

        From here on the agent kills the tree when it hears nothing for `silence`: stay within
        `keep_alive`.

        Args:
            images: the inside image set: plain file names and contents, whole or in pieces.
            criu_options: added to ``criu restore -d …``, or to the engine's command.
            silence: seconds without a frame after which the agent kills the tree.
            timeout: seconds that CRIU may take.
            log_level: CRIU's ``-v``.
            keep_log: leave CRIU's log in the guest.
            volumes: those that podman makes, to be removed if the restore fails.
            engine: what runs CRIU: ``podman``, ``runc`` or ``crun``; see `protocol.Begin`.
            warm_images: if the CRIU with the pool shall do it, the pagemaps of the tasks that get
                memory of it, and their pages images.

        Raises:
            PidTaken: a pid of the images is in use in the guest.
            CriuFailed: CRIU failed; a note on the error has the end of its log.
            RestoreFailed: the agent aborted, or is busy with another session's restore.
            ImagesUnsupported: the inside image set cannot be sent.
            AgentUnreachable: the link broke.
        """
        self._engine = engine or "criu"
        begin = protocol.Begin(
            tuple(criu_options),
            silence_ms=int(silence * 1000),
            timeout_ms=int(timeout * 1000),
            log_level=log_level,
            keep_log=keep_log,
            engine=engine,
            warm_images=tuple(warm_images),
            volumes=tuple(volumes),
        )
        with self.keep_alive(silence / 4):
            try:
                for files in _file_frames(images):
                    self._send_or_hear_why(files)
                self._send_or_hear_why(begin)
            except ProtocolError as error:
                self.close()
                raise ImagesUnsupported(f"the inside image set cannot be sent: {error}") from error
            stopped = self._outcome(protocol.Stopped, self._deadline(timeout + self._timeout))
        return Skeleton(
            stopped.root_pid, stopped.criu_pid, stopped.tasks, stopped.warm, one_line(stopped.note)
        )

    def touch(
        self, pid: int, ranges: Iterable[tuple[int, int]], *, keep: bool, timeout: float = 120.0
    ) -> None:
        """Have pages of a held task allocated, charged to it.

        Args:
            pid: the task, or the process of a `Mapping`; in the guest's initial pid namespace.
            ranges: GVA and size in bytes, whole pages.
            keep: the pages may have content that must stay.
            timeout: seconds that each of several requests may take.

        Raises:
            RestoreFailed: the guest has no memory for them, or they lie in no area of the task.
            AgentUnreachable: the link broke.
        """
        for part in _portions(ranges):
            self._send(protocol.Touch(pid, keep, part))
            self._outcome(protocol.Touched, self._deadline(timeout))

    def map(
        self,
        pid: int,
        file: str,
        size: int,
        ranges: Iterable[tuple[int, int]],
        *,
        timeout: float = 120.0,
    ) -> "Mapping":
        """Have a shared object of a held task mapped by a process of the agent's, up to `go`.

        Args:
            pid: the task; in the guest's initial pid namespace.
            file: below ``/proc/PID``: ``fd/N`` or ``map_files/START-END``.
            size: of the object, in bytes; whole pages.
            ranges: offsets and sizes in bytes of what is to be allocated, charged to the task's
                cgroup.
            timeout: seconds that each of several requests may take.

        Raises:
            RestoreFailed: it is no shared memory, or the guest has no memory for it.
            AgentUnreachable: the link broke.
        """
        first, *more = _portions(ranges)
        self._send(protocol.Map(pid, file, size, first))
        mapped = self._outcome(protocol.Mapped, self._deadline(timeout))
        for part in more:
            here = ((mapped.address + at, length) for at, length in _pairs(part))
            self.touch(mapped.pid, here, keep=True, timeout=timeout)
        return Mapping(mapped.pid, Gva(mapped.address))

    def warm(self, size: int, timeout: float = 600.0) -> "Warm":
        """Have a CRIU started in advance, with so many bytes of memory; 0: end the one there is.

        Raises:
            RestoreFailed: the guest has not so much memory, or cannot do it.
            AgentUnreachable: the link broke.
        """
        self._send(protocol.Warm(size))
        return self._warmed(timeout)

    def pool(self) -> "Warm":
        """Ask what there is.

        Raises:
            AgentUnreachable: the link broke.
        """
        self._send(protocol.Pool())
        return self._warmed(None)

    def _warmed(self, timeout: float | None) -> "Warm":
        found = self._outcome(protocol.Warmed, self._deadline(timeout))
        return Warm(found.size, found.huge, found.pid, Gva(found.address), one_line(found.note))

    def go(self, timeout: float | None = None) -> Restored:
        """Let the tree run; returns when CRIU has detached and ended.

        Raises:
            RestoreFailed: the tree had been killed before, or CRIU failed at the last moment.
            AgentUnreachable: the link broke.
        """
        self._send(protocol.Go())
        restored = self._outcome(protocol.Restored, self._deadline(timeout))
        return Restored(restored.pid, restored.container)

    def abort(self, timeout: float | None = None) -> None:
        """Kill the tree; returns when all of it is gone.

        Raises:
            RestoreFailed: some task could not be killed.
            AgentUnreachable: the link broke (the agent then kills the tree as well).
        """
        self._send(protocol.Abort())
        deadline = self._deadline(timeout)
        message = self._receive(deadline)
        if isinstance(message, protocol.Aborted | protocol.Failed):
            if not message.gone:
                raise _still_there()
        elif not isinstance(message, protocol.Error):
            raise self._broken(f"{message.op} instead of {protocol.Aborted.op}")
        self.ping()  # an end of its own accord may have crossed our words

    def _send_or_hear_why(self, message: Message) -> None:
        """Send during an upload, when the agent hangs up on what it does not like."""
        try:
            self._send(message)
        except AgentUnreachable:
            # Its reason may still be in the line.
            self._outcome(protocol.Stopped, time.monotonic())
            raise

    def _outcome(self, kind: type[MessageT], deadline: float) -> MessageT:
        """Return the `kind` message that a step should end with."""
        message = self._receive(deadline)
        if isinstance(message, kind):
            return message
        if isinstance(message, protocol.Failed):
            raise _failure(message, self._engine)
        if isinstance(message, protocol.Aborted):
            raise _aborted(message)
        if isinstance(message, protocol.Error):
            raise _refused(message)
        raise self._broken(f"{message.op} instead of {kind.op}")


def _portions(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, ...]]:
    """Ranges as the protocol has them, as many as fit into one message."""
    left = iter(ranges)
    while part := tuple(chain.from_iterable(islice(left, protocol.MAX_RANGES))):
        yield part


def _pairs(flat: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _file_frames(images: Files) -> Iterator[protocol.Files]:
    """Pack the files into few frames; large ones go in pieces."""
    names: list[str] = []
    pieces: list[bytes] = []
    size = 0
    for name, content in images.items():
        for piece in _pieces(content):
            cost = 4 * len(name) + len(piece) + 16
            if names and (size + cost > protocol.CHUNK or len(names) == _FILES_PER_FRAME):
                yield protocol.Files(tuple(names), tuple(pieces))
                names, pieces, size = [], [], 0
            names.append(name)
            pieces.append(piece)
            size += cost
    if names:
        yield protocol.Files(tuple(names), tuple(pieces))


def _pieces(content: bytes | Iterable[bytes]) -> Iterator[bytes]:
    step = protocol.CHUNK // 2
    parts = (content,) if isinstance(content, bytes) else content
    yield b""  # an empty file is one too
    for part in parts:
        for start in range(0, len(part), step):
            yield part[start : start + step]


# What CRIU says when clone3(set_tid) fails with EEXIST (fork_with_pid in criu/cr-restore.c), or,
# on kernels without set_tid, when the kernel handed out another pid than the one asked for.
_PID_TAKEN = (
    re.compile(r"Can't fork for (\d+): File exists"),
    re.compile(r"Pid \d+ do not match expected (\d+)"),
    re.compile(r"Thread pid mismatch (\d+)/\d+"),
)


_FREE_MEMORY = "free memory in the guest, or raise the limit of the task's cgroup"
_KILLED = "killed by signal 9"
_OUT_OF_MEMORY = f"was it the OOM killer? See the guest's kernel log; {_FREE_MEMORY}"
# By what the agent says: strerror() of the C library, and its own words.
_CURES = {
    "No space left on device": "free memory or disk space in the guest where that directory is, or"
    " start ovr-agent with another --dir",
    "busy": "wait until the other restore has ended",
    "Cannot allocate memory": _FREE_MEMORY,
    "is the guest out of it?": _FREE_MEMORY,
    "what lies in the memory": "is this agent in the VM that --vm names?",
}


def _failure(message: protocol.Failed, program: str) -> RestoreFailed:
    log = tuple(one_line(line) for line in message.log)
    taken = [match[1] for line in log for known in _PID_TAKEN if (match := known.search(line))]
    error: RestoreFailed
    if taken:
        error = PidTaken(
            f"pid {taken[0]} is in use in the guest",
            f"end the guest's process {taken[0]}, or restore into a pid namespace of its own",
        )
    elif log:
        more = log[-1] if len(log) > 1 else f"that is all that {program} says"
        hint = _OUT_OF_MEMORY if any(_KILLED in line for line in log) else more
        error = CriuFailed(f"{program} in the guest failed ({message.status}): {log[0]}", hint)
    else:
        error = CriuFailed(
            f"{program} in the guest ended with status {message.status} and said nothing",
            "try criu check in the guest",
        )
    error.add_note("\n".join(log))
    return error if message.gone else _still_there()


def _refused(message: protocol.Error) -> RestoreFailed:
    text = one_line(message.text)
    cure = next((cure for sign, cure in _CURES.items() if sign in text), "try again")
    return RestoreFailed(f"the agent refused: {text}", f"the guest is as it was; {cure}")


def _aborted(message: protocol.Aborted) -> RestoreFailed:
    if not message.gone:
        return _still_there()
    return RestoreFailed(
        f"the agent killed the tree: {one_line(message.reason)}",
        "the guest is as it was; the restore can be tried again",
    )


def _still_there() -> RestoreFailed:
    return RestoreFailed(
        "the tree was killed, but some of its tasks do not go away",
        "look for uninterruptible tasks in the guest",
    )
