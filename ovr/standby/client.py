"""The side of ``ovr restore``: have the process that stands by do it, if there is one.

Imports little: this is what a restore waits for in place of all of `ovr`.
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, TextIO

from ovr.standby.messages import FILES, Inbox, StandbyError, send, version
from ovr.standby.place import connect
from ovr.standby.proof import meet

__all__ = ["notes", "restore_there"]

_FORWARDED: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)

notes: list[str] = []
"""For the log: that a process that stood by does this, or why not; empty if there is none."""


def restore_there(arguments: Sequence[str]) -> int | None:
    """Have the process that stands by run ``ovr`` with these arguments, as if this one did.

    It gets this process's open files, directory and environment, and the signals that end it; but
    nothing before it is clear that it has this process's rights, no more and no fewer. If this
    process dies, that one is killed.

    Returns:
        The exit code, or None: nobody stands by, or not for this; nothing has been done.
    """
    try:
        server = connect()
    except (FileNotFoundError, ConnectionRefusedError):  # nobody stands by
        return None
    except OSError as error:
        notes.append(f"no process that stands by is asked: {error.strerror or error}")
        return None
    with server:
        try:
            inbox = meet(server)
            files = _inherited()
            send(server, [b"restore", *_request(arguments, files)], files)
            answer = inbox.wait().fields
            if answer != [b"ready"]:
                raise StandbyError(b" ".join(answer[1:]).decode(errors="replace"))
        except (OSError, StandbyError) as error:
            notes.append(f"the process that stands by does not do this: {error}")
            return None
        return _run(server, inbox)


def _request(arguments: Sequence[str], files: Sequence[int]) -> list[bytes]:
    # What cannot be seen from outside of this process; `child.Request.read` reads it.
    streams = (_encoding(stream) for stream in (sys.stdin, sys.stdout, sys.stderr))
    numbers = ",".join(map(str, files))
    environment = (b"=".join(entry) for entry in os.environb.items())
    words = [os.fsencode(word) for word in arguments]
    return [version(), numbers.encode(), *streams, b"%d" % len(words), *words, *environment]


def _encoding(stream: TextIO | None) -> bytes:
    # None: the file descriptor was closed when Python began.
    return f"{stream.encoding}:{stream.errors}".encode() if stream else b""


def _inherited() -> list[int]:
    # The files that whoever started us has given us; Python's own are closed on exec.
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with suppress(OSError):  # that of the listing
            if os.get_inheritable(int(name)):
                found.append(int(name))
    if len(found) > FILES:
        raise StandbyError(f"more than {FILES} files are open")
    return found


def _run(server: socket.socket, inbox: Inbox) -> int:
    server.settimeout(None)
    for number in _FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: server.send(bytes([number])) and None)
    try:
        send(server, [b"go"])
        status = int(inbox.wait().argument(b"ended"))
    except (OSError, StandbyError, ValueError):
        print(
            "ovr: the process that stood by for this restore has died, and the restore with it"
            " (`ovr ps` shows whether the tree runs; `ovr warm` starts another)",
            file=sys.stderr,
        )
        return 1
    if status < 0:  # killed by this signal; whoever waits for us is to see that
        with suppress(OSError):  # SIGKILL cannot be set
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
        return 128 - status  # it is blocked
    return status
