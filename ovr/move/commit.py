"""The commit of a move: at most one of the two trees ever runs.

The source's tree is prepared: frozen so that nothing but a decision lets it run. Then the
destination's is let run, and the source's is ended when the other is seen to run. If it cannot be
known whether the destination's tree runs, the move is in doubt until `decide` has asked there.
"""

from collections.abc import Callable
from typing import Final, TypeVar

from ovr.attempt.attempt import Attempt
from ovr.errors import AttemptFailed, MoveInDoubt
from ovr.guest.client.agent import Agent
from ovr.kernel import find_task

__all__ = ["commit"]

T = TypeVar("T")

_BACK: Final = "ovr move --back, with the same --from and --to, lets it run on"
_DECIDE: Final = "ovr move --finish or ovr move --back, with the same --from and --to, decides it"


def commit(
    source: Attempt,
    destination: Attempt,
    move: str,
    root_pid: int,
    let_run: Callable[[Agent], T],
) -> tuple[T, bytes]:
    """Let the destination's tree run, and end that of the source.

    Args:
        source: holds the tree that was dumped.
        destination: holds the restored one.
        move: the id of the move, which the destination's agent knows.
        root_pid: pid of the restored root task, in the initial pid namespace.
        let_run: lets the restored tree run, and checks that it does.

    Returns:
        The result of `let_run`, and the ``stats-dump`` of the source's CRIU.

    Raises:
        MoveInDoubt: it is not known whether the destination's tree runs; the source's is frozen.
            Or it runs, and the source's is still there, frozen.
        OvrError: the source's tree runs on, and there is none in the destination.
    """
    told = runs = False

    def tell(agent: Agent) -> T:
        nonlocal told
        # Before the first byte is sent: whatever interrupts us, the source's tree stays frozen.
        source.keep()
        told = True
        return let_run(agent)

    _prepare(source, move)
    try:
        done = destination.commit(tell)
        runs = True
        return done, source.commit(Agent.end_dump)
    except BaseException as error:
        if runs:
            source.leave()
            raise MoveInDoubt(
                f"the tree runs in the destination, and that of the source is still there, frozen:"
                f" {_said(error)}",
                "ovr move --finish, with the same --from and --to, ends it",
                move,
            ) from error
        if told and not (isinstance(error, AttemptFailed) and _gone(destination, root_pid)):
            source.leave()
            raise MoveInDoubt(
                f"it is not known whether the tree runs in the destination: {_said(error)}",
                _DECIDE, move,
            ) from error  # fmt: skip
        _take_back(source, move, error)
        raise


def _prepare(source: Attempt, move: str) -> None:
    try:
        source.agent.prepare(move)
    except AttemptFailed:
        raise  # it is held as before
    except BaseException as error:
        source.leave()
        raise MoveInDoubt(
            f"the tree does not run in the destination, and may be frozen in the source:"
            f" {_said(error)}",
            _BACK, move,
        ) from error  # fmt: skip


def _take_back(source: Attempt, move: str, cause: BaseException) -> None:
    try:
        source.abort()
    except AttemptFailed:
        raise  # it runs, but not as before
    except BaseException as error:
        raise MoveInDoubt(
            f"the tree does not run in the destination ({_said(cause)}), and is frozen in the"
            f" source: {_said(error)}",
            _BACK, move,
        ) from cause  # fmt: skip


def _gone(destination: Attempt, root_pid: int) -> bool:
    try:
        destination.vm.check_same_boot()
        task = find_task(destination.vm.kernel, root_pid)
        return task is None or not task.mm
    except BaseException:
        return False  # not known, whatever the reason; the caller reports the first error


def _said(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
