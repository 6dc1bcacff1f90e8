"""Send the requests of a restore or dump to the agent in the guest."""

import collections.abc
import hmac
from collections.abc import Iterable, Sequence
from typing import Final

from ovr.errors import AgentUntrusted, ImagesUnsupported
from ovr.guest import dump_protocol, protocol
from ovr.guest.client.failures import refused
from ovr.guest.client.moves import Moves
from ovr.guest.client.requests import Files, Portion, file_frames, flat, touch_requests
from ovr.guest.client.results import HeldTree, MappedObject, PoolInfo, Restored
from ovr.guest.client.session import one_line
from ovr.guest.client.steps import STALL_SECONDS, STEP_SECONDS
from ovr.guest.codes import Code
from ovr.guest.message import Message
from ovr.guest.protocol import Touching
from ovr.guest.wire import ProtocolError
from ovr.memory.addresses import Gva

__all__ = ["Agent"]

_ABORT_SECONDS: Final = 180.0
_OF_A_DUMP: Final[tuple[type[Message], ...]] = (
    dump_protocol.Starts, dump_protocol.Frozen, dump_protocol.Tracked, dump_protocol.Saved,
    protocol.Stopped,
)  # fmt: skip


class Agent(Moves):
    """A session for a restore or dump: `authenticate`, `begin` or `dump`, `go` or `abort`.

    ::

        with Agent.connect("vsock:3") as agent:
            authenticate(kernel, agent, holder)
            skeleton = agent.begin(images)
            with agent.keep_alive():
                ...  # write memory and state from outside
            agent.go()
    """

    def authenticate(self, secret: bytes) -> None:
        """Prove to the agent that the host knows its secret, and check that the agent knows it too.

        Args:
            secret: the secret that `ovr.attempt.authentication` found in its memory.

        Raises:
            AgentUntrusted: one side does not have the other's secret.
            AgentUnreachable: the link broke, or an invalid message came.
        """
        self._send(protocol.Prove(self._proof(protocol.PROOF_OF_HOST, secret)))
        message = self._receive(self._deadline(None))
        right = self._proof(protocol.PROOF_OF_AGENT, secret)
        if isinstance(message, protocol.Proved):
            if hmac.compare_digest(message.proof, right):
                return
        elif not isinstance(message, protocol.Error):
            raise self._broken(f"{message.op} instead of {protocol.Proved.op}")
        elif message.code != Code.PROOF:
            raise refused(message)
        self.close()
        raise AgentUntrusted(
            f"the agent at {self.address} failed to authenticate: it does not know the secret in"
            " the memory of the process that it claims to be",
            "is another program between ovr and the agent, or in its place?",
            "proof",
        )

    def _proof(self, side: bytes, secret: bytes) -> bytes:
        text = protocol.proof_text(side, self._token, self.hello.nonce)
        return hmac.digest(secret, text, "sha256")

    def begin(
        self,
        images: Files,
        *,
        criu_options: Sequence[str] = (),
        silence: float = 10.0,
        stall: float = STALL_SECONDS,
        timeout: float | None = None,
        log_level: int = 2,
        keep_log: bool = False,
        engine: str | None = None,
        volumes: Sequence[str] = (),
        warm_images: Sequence[str] = (),
        move: str | None = None,
    ) -> HeldTree:
        """Have the guest's CRIU build the tree from `images`, up to its pre-resume hook.

        From here on the agent kills the tree after `silence` seconds without a frame: stay within
        `keep_alive`.

        Args:
            images: the inside image set: plain file names and contents, whole or in pieces.
            criu_options: added to ``criu restore -d …``, or to the engine's command.
            silence: seconds without a frame after which the agent kills the tree.
            stall: seconds without progress of CRIU after which the agent kills the tree.
            timeout: seconds that CRIU may take; None: as long as it makes progress.
            log_level: CRIU's ``-v``.
            keep_log: leave CRIU's log in the guest.
            volumes: volumes that podman creates, to be removed if the restore fails.
            engine: the engine that runs CRIU: ``podman``, ``runc`` or ``crun``; see
                `protocol.Begin`.
            warm_images: pagemaps and pages images of the tasks that get memory from the pool; empty
                if the pool is not used.
            move: the id of the move that ends here; see `Moves`.

        Raises:
            PidTaken: a pid of the images is in use in the guest.
            CriuFailed: CRIU failed; a note on the error has the end of its log.
            AttemptFailed: the agent aborted, or is busy with another session's restore.
            ImagesUnsupported: the inside image set cannot be sent.
            AgentUnreachable: the link broke.
        """
        self._engine, self._dumps = engine or "criu", False
        begin = protocol.Begin(
            tuple(criu_options),
            silence_ms=int(silence * 1000),
            stall_ms=int(stall * 1000),
            timeout_ms=None if timeout is None else int(timeout * 1000),
            log_level=log_level,
            keep_log=keep_log,
            engine=engine,
            warm_images=tuple(warm_images),
            volumes=tuple(volumes),
            move=move,
        )
        with self.keep_alive(silence / 4):
            try:
                for files in file_frames(images):
                    self._send_or_fail(files)
                self._send_or_fail(begin)
            except ProtocolError as error:
                self.close()
                raise ImagesUnsupported(f"the inside image set cannot be sent: {error}") from error
            stopped = self._outcome(protocol.Stopped)
        return HeldTree(
            stopped.root_pid, stopped.criu_pid, stopped.tasks, stopped.warm, one_line(stopped.note)
        )

    def touch(self, portions: Iterable[Portion]) -> None:
        """Allocate pages of held tasks, charged to them.

        The agent forks a process for each request, so portions of many tasks share one.

        Args:
            portions: the pages.

        Raises:
            AttemptFailed: the guest has no memory for them, or no area of the task contains them.
            AgentUnreachable: the link broke.
        """
        for request in touch_requests(portions):
            self._send(request)
            self._outcome(protocol.Touched, self._deadline(STEP_SECONDS))

    def map(
        self,
        pid: int,
        file: str,
        size: int,
        ranges: Sequence[tuple[int, int]],
    ) -> "MappedObject":
        """Map a shared object of a held task into a process of the agent, until `go`.

        Args:
            pid: the task; in the guest's initial pid namespace.
            file: its link to the object below ``/proc/PID``: ``fd/N`` or ``map_files/START-END``.
            size: size of the object in bytes; whole pages.
            ranges: offsets and sizes in bytes of the pages to allocate, charged to the task's
                cgroup.

        Raises:
            AttemptFailed: it is not shared memory, or the guest has no memory for it.
            AgentUnreachable: the link broke.
        """
        first, more = ranges[: protocol.MAX_RANGES], ranges[protocol.MAX_RANGES :]
        self._send(protocol.Map(pid, file, size, flat(first)))
        mapped = self._outcome(protocol.Mapped, self._deadline(STEP_SECONDS))
        here = [(mapped.address + at, length) for at, length in more]
        self.touch([Portion(mapped.pid, Touching.KEEP, here)])
        return MappedObject(mapped.pid, Gva(mapped.address))

    def warm(self, size: int, place: int = 0, *, keep: bool = True) -> "PoolInfo":
        """Start a CRIU with a pool in advance, or end it.

        Args:
            size: size of the pool in bytes; 0 ends the present one.
            place: offset of its address modulo 1 GiB, in bytes; whole huge pages.
            keep: let it outlive this session; otherwise it ends with it, unless a restore has taken
                it.

        Raises:
            AttemptFailed: the guest lacks the memory, or cannot have a pool.
            AgentUnreachable: the link broke.
        """
        self._send(protocol.Warm(size, place, keep))
        return self._warmed()

    def pool(self) -> "PoolInfo":
        """Return the present pool.

        Raises:
            AgentUnreachable: the link broke.
        """
        self._send(protocol.Pool())
        return self._warmed()

    def criu_config(self) -> collections.abc.Mapping[str, str]:
        """Return the guest's default configuration files of CRIU, by path.

        A file larger than `protocol.MAX_CONFIG` is cut there, after the last whole line; bytes that
        are not UTF-8 are replaced.

        Raises:
            AgentUnreachable: the link broke, or an invalid message came.
        """
        self._send(protocol.Config())
        found = self._outcome(protocol.Configured, self._deadline(None))
        if len(found.names) != len(found.data) or len(found.names) > protocol.CONFIG_FILES:
            raise self._broken(f"{len(found.names)} files with {len(found.data)} contents")
        return dict(zip(map(one_line, found.names), map(_whole_lines, found.data), strict=True))

    def _warmed(self) -> "PoolInfo":
        found = self._outcome(protocol.Warmed)
        return PoolInfo(found.size, found.huge, found.pid, Gva(found.address), one_line(found.note))

    def go(self) -> Restored:
        """Let the tree run; return when CRIU has detached and ended.

        Raises:
            AttemptFailed: the tree had been killed before, or CRIU failed when it detached.
            AgentUnreachable: the link broke.
        """
        self._send(protocol.Go())
        restored = self._outcome(protocol.Restored, self._deadline(STEP_SECONDS))
        return Restored(restored.pid, restored.container)

    def abort(self) -> None:
        """Abort; return when no task of a restored tree is left, or a dumped one runs on.

        Raises:
            AttemptFailed: a task could not be killed, or the dumped tree may not run as before.
            AgentUnreachable: the link broke (the agent then aborts as well).
        """
        self._send(protocol.Abort())
        deadline = self._deadline(_ABORT_SECONDS)
        # What the agent sent before it read this.
        sent = _OF_A_DUMP + ((dump_protocol.Dumped,) if self._archive_is_due else ())
        while isinstance(message := self._receive(deadline), sent):
            pass
        self._archive_is_due = False
        if isinstance(message, protocol.Aborted | protocol.Failed):
            if not message.undone:
                self._checked(message, protocol.Stopped)
        elif not isinstance(message, protocol.Error):
            raise self._broken(f"{message.op} instead of {protocol.Aborted.op}")
        self.ping()  # the agent may have sent its own `Aborted` before it got ours


def _whole_lines(data: bytes) -> str:
    if len(data) >= protocol.MAX_CONFIG:
        data = data[: protocol.MAX_CONFIG].rpartition(b"\n")[0]
    return data.decode(errors="replace")
