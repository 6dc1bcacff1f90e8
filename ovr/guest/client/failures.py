"""Turn the agent's messages on failed restores and dumps into errors.

Hints are chosen by the agent's codes. Only CRIU's log is searched (`criu_log`): it has no codes.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from ovr.errors import AttemptFailed, CriuFailed, PidTaken, TreeDamaged
from ovr.guest import protocol
from ovr.guest.client.criu_log import FREE_MEMORY, KILLED, failure_in
from ovr.guest.client.session import one_line
from ovr.guest.codes import Code

__all__ = ["aborted", "criu_lacked", "failure", "refused", "still_there"]

# CRIU's messages when clone3(set_tid) fails with EEXIST (fork_with_pid in criu/cr-restore.c), or,
# on kernels without set_tid, when the new process got another pid than requested.
_PID_TAKEN: Final = (
    re.compile(r"Can't fork for (\d+): File exists"),
    re.compile(r"Pid \d+ do not match expected (\d+)"),
    re.compile(r"Thread pid mismatch (\d+)/\d+"),
)
_SAME_VERSION: Final = "install the ovr-agent of this ovr in the guest: ovr agent deb"
_AGAIN: Final = "try again"

_CURES: Final[Mapping[str, str]] = {
    Code.PROTOCOL: _SAME_VERSION,
    Code.VERSION: _SAME_VERSION,
    Code.UNPROVEN: "is another program between ovr and the agent?",
    Code.PROOF: "is this agent in the VM that --vm names?",
    Code.BUSY: "wait until the other restore or dump has ended",
    Code.NO_MEMORY: FREE_MEMORY,
    Code.NO_SPACE: "free memory or disk space in the guest where that directory is, or start"
    " ovr-agent with another --dir",
    Code.KILLED: KILLED,
    Code.REPLACED: "restart the agent in the guest: systemctl restart ovr-agent",
    Code.CGROUP: "the tree must be in cgroups of version 2 that are not threaded",
    Code.DOUBT: "it was decided, or its tree has ended",
    Code.START: "is it installed in the guest, where the agent finds it?",
}

_CURES_OF_ABORTS: Final[Mapping[str, str]] = {
    Code.LINK: "was QEMU or the host too busy?",
    Code.SILENT: "was ovr stopped, or the host too busy?",
    Code.TIMEOUT: "give a longer --timeout, or none",
    Code.STALLED: "does it wait for a file server or a full pipe in the guest?",
    Code.AGENT: "wait until the agent runs again",
    Code.CRIU: f"see the guest's kernel log; {FREE_MEMORY}",
    Code.OUTCOME: "free memory in the guest where the agent's directory is",
    Code.HOOK: "was a process called ovr-agent killed in the guest?",
}

_CURES_OF_DAMAGE: Final[Mapping[str, str]] = {
    Code.HANGS: "the tree may be stopped until CRIU ends: look in the guest for what it waits for,"
    " such as a file server",
    Code.CGROUP: "they have been killed: look in the guest for what they wait for",
}
_CHECK_TREE: Final = (
    "see whether the tree still works, and its network; if not, end it and start it again"
)


@contextmanager
def criu_lacked(unread_config: Mapping[str, str]) -> Iterator[None]:
    """Tell a `CriuFailed` in the body which configuration files the guest's CRIU has not read.

    It may have failed because it lacked an option in them.
    """
    try:
        yield
    except CriuFailed as error:
        error.unread_config = unread_config
        raise


def failure(message: protocol.Failed, program: str, *, dump: bool = False) -> AttemptFailed:
    """Return the error for a failure of `program`, CRIU or an engine, in a restore or `dump`."""
    log = tuple(one_line(line) for line in message.log)
    taken = [match[1] for line in log for known in _PID_TAKEN if (match := known.search(line))]
    error: AttemptFailed
    if taken:
        error = PidTaken(
            f"pid {taken[0]} is in use in the guest",
            f"end the guest's process {taken[0]}, or restore into a pid namespace of its own",
        )
    elif log:
        found = failure_in(log)
        more = log[-1] if len(log) > 1 else f"{program} logged nothing else"
        error = CriuFailed(
            f"{program} in the guest failed ({message.status}): {found.line}", found.cure or more
        )
        error.file = found.file
    else:
        error = CriuFailed(
            f"{program} in the guest ended with status {message.status} and no message",
            "try criu check in the guest",
        )
    if not message.undone:
        killed = f"{program} in the guest was killed ({message.status})"
        error = _damaged(killed, Code.CRIU) if dump else still_there()
    error.add_note("\n".join(log))
    return error


def refused(message: protocol.Error) -> AttemptFailed:
    """Return the error for a request that the agent rejected."""
    cure = _CURES.get(message.code, _AGAIN)
    text = f"the agent refused: {one_line(message.text)}"
    return _coded(AttemptFailed(text, f"the guest is as it was; {cure}"), message.code)


def aborted(message: protocol.Aborted, *, dump: bool = False) -> AttemptFailed:
    """Return the error for a restore or `dump` that the agent aborted of its own accord."""
    if not message.undone:
        return _damaged(one_line(message.reason), message.code) if dump else still_there()
    cure = _CURES_OF_ABORTS.get(message.code)
    hint = (
        "the tree runs on; the dump can be tried again"
        if dump
        else "the guest is as it was; the restore can be tried again"
    )
    done = "the agent aborted the dump: " if dump else "the agent killed the tree: "
    text = f"{done}{one_line(message.reason)}"
    return _coded(AttemptFailed(text, f"{hint}; {cure}" if cure else hint), message.code)


def still_there() -> AttemptFailed:
    """Return the error for a killed tree whose tasks have not all ended."""
    return AttemptFailed(
        "the tree was killed, but some of its tasks do not end",
        "look for uninterruptible tasks in the guest",
    )


def _damaged(reason: str, code: str) -> AttemptFailed:
    """Return the error for a dumped tree that was not released in order."""
    error = TreeDamaged(
        f"the dump failed, and its tree may not run as before: {reason}",
        _CURES_OF_DAMAGE.get(code, _CHECK_TREE),
    )
    return _coded(error, code)


def _coded(error: AttemptFailed, code: str) -> AttemptFailed:
    error.code = one_line(code)
    return error
