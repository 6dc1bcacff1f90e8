"""What the agent says of a restore that went wrong, as the errors that a user sees."""

import re

from ovr.errors import CriuFailed, PidTaken, RestoreFailed
from ovr.guest import protocol
from ovr.vm.session import one_line

__all__ = ["aborted", "failure", "refused", "still_there"]

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


def failure(message: protocol.Failed, program: str) -> RestoreFailed:
    """Return the error for a failure of CRIU's or, as `program` says, of an engine's."""
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
    return error if message.gone else still_there()


def refused(message: protocol.Error) -> RestoreFailed:
    """Return the error for a request that the agent refused."""
    text = one_line(message.text)
    cure = next((cure for sign, cure in _CURES.items() if sign in text), "try again")
    return RestoreFailed(f"the agent refused: {text}", f"the guest is as it was; {cure}")


def aborted(message: protocol.Aborted) -> RestoreFailed:
    """Return the error for a tree that the agent killed of its own accord."""
    if not message.gone:
        return still_there()
    return RestoreFailed(
        f"the agent killed the tree: {one_line(message.reason)}",
        "the guest is as it was; the restore can be tried again",
    )


def still_there() -> RestoreFailed:
    """Return the error for a tree that was killed and does not go."""
    return RestoreFailed(
        "the tree was killed, but some of its tasks do not go away",
        "look for uninterruptible tasks in the guest",
    )
