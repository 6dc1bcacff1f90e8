"""Send the requests of a dump to the agent in the guest."""

from collections.abc import Callable, Sequence
from typing import Final

from ovr.errors import ArchiveFailed
from ovr.guest import dump_protocol, protocol
from ovr.guest.client.failures import failure
from ovr.guest.client.requests import Files, file_frames
from ovr.guest.client.results import HeldTree
from ovr.guest.client.steps import STALL_SECONDS, STEP_SECONDS, Steps
from ovr.guest.message import Message
from ovr.guest.protocol import ENGINE_ARCHIVE, HOOK_HELD

__all__ = ["Dumps"]

_NEEDED: Final = "inventory.img"
"""The image of the parent without which CRIU dumps nothing."""


class Dumps(Steps):
    """A session for a dump.

    `find` for a container; `start_dump`, `track`, `held`; then `end_dump`, or the agent's `abort`.
    """

    def find(self, engine: str, name: str) -> dump_protocol.Found:
        """Ask an engine in the guest for a container.

        Args:
            engine: ``podman``, ``runc`` or ``crun``.
            name: name or id of the container.

        Raises:
            AttemptFailed: the engine cannot be started, or another session asks.
            AgentUnreachable: the link broke.
        """
        self._send(dump_protocol.Find(engine, name))
        return self._outcome(dump_protocol.Found, self._deadline(STEP_SECONDS))

    def start_dump(
        self,
        pid: int,
        parent: Files,
        *,
        criu_options: Sequence[str] = (),
        leave_running: bool = False,
        silence: float = 10.0,
        stall: float = STALL_SECONDS,
        timeout: float | None = None,
        log_level: int = 2,
        keep_log: bool = False,
        engine: str | None = None,
        name: str | None = None,
    ) -> None:
        """Have the guest's CRIU start to dump a running tree; it waits before it stops the tree.

        From here on the agent lets the tree run on after `silence` seconds without a frame: stay
        within `keep_alive`.

        Args:
            pid: the root task, in the guest's initial pid namespace.
            parent: the parent image set.
            criu_options: added to ``criu dump …``, or to the engine's ``checkpoint``.
            leave_running: let the tree run on after `end_dump`, instead of ending it.
            silence: seconds without a frame after which the agent aborts.
            stall: seconds without progress of CRIU after which the agent aborts.
            timeout: seconds that CRIU may take; None: as long as it makes progress.
            log_level: CRIU's ``-v``.
            keep_log: leave CRIU's log in the guest.
            engine: the engine that runs CRIU: ``podman``, ``runc`` or ``crun``. Then CRIU fails
                without the agent's hook.
            name: then the name or id of its container.

        Raises:
            CriuFailed: CRIU or the engine failed; a note on the error has the end of its log.
            AttemptFailed: the agent aborted, or is busy with another session.
            AgentUnreachable: the link broke.
        """
        self._engine, self._dumps = engine or "criu", True
        begin = dump_protocol.Dump(
            pid,
            tuple(criu_options),
            leave_running,
            silence_ms=int(silence * 1000),
            stall_ms=int(stall * 1000),
            timeout_ms=None if timeout is None else int(timeout * 1000),
            log_level=log_level,
            keep_log=keep_log,
            engine=engine,
            name=name,
        )
        if engine:
            parent = {HOOK_HELD + key if key == _NEEDED else key: parent[key] for key in parent}
        with self.keep_alive(silence / 4):
            self.add_to_parent(parent)
            self._send_or_fail(begin)
            self._outcome(dump_protocol.Starts)

    def add_to_parent(self, files: Files) -> None:
        """Add files to the parent image set, before CRIU stops the tree.

        Raises:
            CriuFailed, AttemptFailed, AgentUnreachable: as `start_dump`.
        """
        for message in file_frames(files):
            self._send_or_fail(message)

    def freeze(self) -> None:
        """Stop all threads of the tree until `track`; the agent aborts if that does not come soon.

        Raises:
            CriuFailed, AttemptFailed, AgentUnreachable: as `start_dump`.
        """
        self._send(dump_protocol.Freeze())
        self._outcome(dump_protocol.Frozen, self._deadline(STEP_SECONDS))

    def track(self, *, stop: bool = False) -> float:
        """Clear the soft-dirty bits of the tree; if it is frozen, let it run on.

        Args:
            stop: then let CRIU go on, which stops the tree: call `held` next.

        Returns:
            Seconds for which it was frozen.

        Raises:
            CriuFailed, AttemptFailed, AgentUnreachable: as `start_dump`.
        """
        self._send(dump_protocol.Track(stop))
        tracked = self._outcome(dump_protocol.Tracked, self._deadline(STEP_SECONDS))
        return tracked.frozen_us / 1e6

    def held(self, save: Callable[[str, bytes], None]) -> HeldTree:
        """Wait until CRIU has dumped the tree but for its memory, and holds it.

        Args:
            save: called with a name and the next piece of that image, empty at its end, for all
                images but pages images. Names are as the agent sent them.

        Raises:
            CriuFailed, AttemptFailed, AgentUnreachable: as `start_dump`.
            BaseException: whatever `save` raises.
        """
        held = self._receive_images(save)
        return HeldTree(held.root_pid, held.criu_pid, held.tasks)

    def fetch(self, name: str, save: Callable[[str, bytes], None]) -> None:
        """Get a pages image that CRIU has written; `save` as for `held`.

        Raises:
            AttemptFailed: there is none.
            AgentUnreachable: the link broke.
            BaseException: whatever `save` raises.
        """
        self._send(dump_protocol.Fetch(name))
        self._receive_images(save)

    def _receive_images(self, save: Callable[[str, bytes], None]) -> protocol.Stopped:
        while isinstance(message := self._receive(None), dump_protocol.Saved):
            save(message.name, message.data)
        return self._checked(message, protocol.Stopped)

    def end_dump(self, save_archive: Callable[[bytes], None] | None = None) -> bytes:
        """Let CRIU end a dump; return its ``stats-dump`` when it has ended.

        Args:
            save_archive: called with the pieces of podman's archive, if podman dumps.

        Raises:
            AttemptFailed: the dump had been aborted before, or CRIU failed at the last moment. With
                the code ``engine``: podman has not removed a moved container, which is still
                frozen; try again.
            ArchiveFailed: the engine failed after the container had ended.
            AgentUnreachable: the link broke.
            BaseException: whatever `save_archive` raises.
        """
        self._send(protocol.Go())
        message = self._receive_archive(save_archive)
        if isinstance(message, protocol.Failed) and not message.undone and self._engine != "criu":
            said = protocol.Failed(message.status, message.log, undone=True)
            cause = failure(said, self._engine)
            raise ArchiveFailed(str(cause), cause.hint)
        return self._checked(message, dump_protocol.Dumped).stats

    def _receive_archive(self, save: Callable[[bytes], None] | None) -> Message:
        # Returns the message after it.
        deadline = None if save else self._deadline(STEP_SECONDS)
        with self.keep_alive():
            while isinstance(message := self._receive(deadline), dump_protocol.Saved):
                if message.name != ENGINE_ARCHIVE or save is None:
                    raise self._broken(f"{message.name[:80]!r} when CRIU ends")
                save(message.data)
        return message
