"""Decide a move that is in doubt: finish it, or take it back."""

from ovr.attempt.attempt import Attempt
from ovr.errors import CheckFailed, UsageError
from ovr.guest.client.agent import Agent

__all__ = ["decide"]


def decide(source: Attempt, destination: Agent | None, move: str | None, *, finish: bool) -> str:
    """Finish a move that is in doubt, or take it back; return its id.

    Args:
        source: the VM that has the frozen tree.
        destination: the agent of the other VM, authenticated; None: that VM is gone for good.
        move: the id of the move; None: there is only one in doubt.
        finish: end the tree of the source, because that of the destination runs, or has run;
            otherwise let it run on, because the other never ran.

    Raises:
        UsageError: no such move is in doubt, or there are several; or both sides are one VM.
        CheckFailed: the destination contradicts the decision, or still holds its tree.
        AttemptFailed: the agent of the source failed.
        AgentUnreachable: a link broke.
    """
    move = _which(source.agent.doubts(), move)
    _refuse_itself(source.agent, destination)
    _check(destination, move, finish=finish)
    source.agent.adopt(move)
    if finish:
        source.agent.end_dump()
    else:
        source.agent.abort()
    return move


def _which(found: tuple[str, ...], wanted: str | None) -> str:
    if wanted is not None and wanted not in found:
        raise _coded(
            UsageError(
                f"no move {wanted} is in doubt in the source", "has it been decided meanwhile?"
            ),
            "no-doubt",
        )
    if not found:
        raise _coded(UsageError("no move is in doubt in the source", "nothing to do"), "no-doubt")
    if wanted is None and len(found) > 1:
        raise _coded(
            UsageError(
                f"{len(found)} moves are in doubt in the source: {', '.join(found)}",
                "name one with --id",
            ),
            "several-doubts",
        )
    return wanted or found[0]


def _refuse_itself(source: Agent, destination: Agent | None) -> None:
    # The source has never let the tree run as that of a move: its word would free both trees.
    if destination is not None and destination.hello.boot_id == source.hello.boot_id:
        raise _coded(
            UsageError(
                "the VM of --to is that of --from, which has the frozen tree",
                "name the VM that the tree was moved to",
            ),
            "same-vm",
        )


def _check(destination: Agent | None, move: str, *, finish: bool) -> None:
    if destination is None:
        if finish:
            raise UsageError(
                "without its destination a move cannot be finished", "give --to, or --back"
            )
        return
    outcome = destination.moved(move)
    if outcome.held:
        raise _coded(
            CheckFailed("the destination still holds its tree", "try again in a moment"), "held"
        )
    if outcome.released != finish:
        runs = "was let run" if outcome.released else "was never let run"
        cure = "--finish" if outcome.released else "--back"
        raise _coded(
            CheckFailed(f"the tree {runs} in the destination", f"give {cure}"),
            "released" if outcome.released else "not-released",
        )


def _coded(error: CheckFailed | UsageError, code: str) -> CheckFailed | UsageError:
    error.code = code
    return error
