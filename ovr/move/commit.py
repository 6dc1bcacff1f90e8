"""The commit of a move: at most one of the two trees ever runs.

The source's tree is prepared: frozen so that nothing but a decision lets it run. Then the
destination's is let run, and the source's is ended when the other is seen to run. If it cannot be
known whether the destination's tree runs, the move is in doubt until `decide` has asked there.
"""

from collections.abc import Callable
from enum import IntEnum, auto
from types import TracebackType
from typing import Final, Self, TypeVar

from ovr.attempt.attempt import Attempt
from ovr.errors import AttemptFailed, MoveInDoubt
from ovr.guest.client.agent import Agent
from ovr.kernel import find_task

__all__ = ["Commit"]

T = TypeVar("T")

_BACK: Final = "ovr move --back, with the same --from and --to, lets it run on"
_DECIDE: Final = "ovr move --finish or ovr move --back, with the same --from and --to, decides it"


class _State(IntEnum):
    HELD = auto()  # the source holds its tree as for any dump, or leaves it as it is
    PREPARED = auto()  # it is frozen, and the destination was told nothing
    TOLD = auto()  # the destination may have let its tree run
    RUNS = auto()  # it has


class Commit:
    """Two attempts at one move; a context manager around all of it from `prepare` on.

    Leaving it with an error lets the source's tree run on, unless that of the destination may run.

    Args:
        source: holds the tree that is dumped.
        destination: holds the restored one when `run` is called.
        move: the id of the move, which the destination's agent knows.

    Raises:
        MoveInDoubt: it is not known whether the destination's tree runs; the source's is frozen.
            Or it runs, and the source's is still there, frozen. Or the source's may be frozen.
    """

    def __init__(self, source: Attempt, destination: Attempt, move: str) -> None:
        self._source = source
        self._destination = destination
        self._move = move
        self._state = _State.HELD
        self._root_pid = 0

    def prepare(self) -> None:
        """Freeze the source's tree until it is ended or let run on.

        Raises:
            AttemptFailed: it cannot be frozen, and is held as before.
            MoveInDoubt: it may be frozen.
        """
        try:
            self._source.agent.prepare(self._move)
        except AttemptFailed:
            raise
        except BaseException as error:
            self._source.leave()
            raise self._in_doubt(
                "the tree does not run in the destination, and may be frozen in the source:"
                f" {_said(error)}",
                _BACK,
            ) from error
        self._state = _State.PREPARED

    def archive(self, save: Callable[[bytes], None]) -> None:
        """Have podman in the source write the archive of the container, which is prepared.

        Args:
            save: called with its pieces.

        Raises:
            AttemptFailed: podman failed, and the container runs on.
            OvrError: as for `run`.
        """
        try:
            self._source.agent.archive(save)
        except AttemptFailed:
            self._state = _State.HELD  # the agent has put it back
            raise

    def run(self, root_pid: int, let_run: Callable[[Agent], T]) -> tuple[T, bytes]:
        """Let the destination's tree run, and end that of the source, which is prepared.

        Args:
            root_pid: pid of the restored root task, in the initial pid namespace.
            let_run: lets the restored tree run, and checks that it does.

        Returns:
            The result of `let_run`, and the ``stats-dump`` of the source's CRIU.

        Raises:
            OvrError: on leaving the context this becomes `MoveInDoubt`, or the source's tree runs
                on and there is none in the destination.
        """
        assert self._state == _State.PREPARED, "run() before prepare()"
        self._root_pid = root_pid

        def tell(agent: Agent) -> T:
            # Before the first byte is sent: whatever interrupts us, the source's tree stays frozen.
            self._source.keep()
            self._state = _State.TOLD
            return let_run(agent)

        done = self._destination.commit(tell)
        self._state = _State.RUNS
        stats = self._source.commit(Agent.end_dump)
        self._state = _State.HELD
        return done, stats

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or self._state == _State.HELD:
            return
        if self._state == _State.RUNS:
            self._source.leave()
            raise self._in_doubt(
                "the tree runs in the destination, and that of the source is still there, frozen:"
                f" {_said(error)}",
                "ovr move --finish, with the same --from and --to, ends it",
            ) from error
        if self._state == _State.TOLD and not self._has_failed(error):
            self._source.leave()
            raise self._in_doubt(
                f"it is not known whether the tree runs in the destination: {_said(error)}", _DECIDE
            ) from error
        self._take_back(error)

    def _has_failed(self, error: BaseException) -> bool:
        """Return whether the destination says so, and its tree is gone."""
        if not isinstance(error, AttemptFailed):
            return False
        try:
            self._destination.vm.check_same_boot()
            task = find_task(self._destination.vm.kernel, self._root_pid)
            return task is None or not task.mm
        except BaseException:
            return False  # not known, whatever the reason; the first error is reported

    def _take_back(self, cause: BaseException) -> None:
        try:
            self._source.abort()
        except AttemptFailed:
            raise  # it runs, but not as before
        except BaseException as error:
            raise self._in_doubt(
                f"the tree does not run in the destination ({_said(cause)}), and is frozen in the"
                f" source: {_said(error)}",
                _BACK,
            ) from cause

    def _in_doubt(self, text: str, cure: str) -> MoveInDoubt:
        return MoveInDoubt(text, cure, self._move)


def _said(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
