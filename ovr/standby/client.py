"""The client: ``ovr restore``, which passes its work to the standby process, if there is one.

Imports little: a restore waits for this instead of all of `ovr`.
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
"""For the log: that a standby process does the work, or why not; empty if there is none."""


def restore_there(arguments: Sequence[str]) -> int | None:
    """Have the standby process run ``ovr`` with these arguments, as if this process did.

    It gets this process's open files, directory and environment, and the signals that end it, but
    only after a check that it has exactly this process's rights. If this process dies, the child
    that does the work is killed.

    Returns:
        The exit code, or None if no standby process took the work and nothing has been done.
    """
    try:
        server = connect()
    except (FileNotFoundError, ConnectionRefusedError):  # there is no standby process
        return None
    except OSError as error:
        notes.append(f"no standby process: {error.strerror or error}")
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
            notes.append(f"not done by the standby process: {error}")
            return None
        return _run(server, inbox)


def _request(arguments: Sequence[str], files: Sequence[int]) -> list[bytes]:
    # State that other processes cannot read; `child.Request.read` parses it.
    streams = (_encoding(stream) for stream in (sys.stdin, sys.stdout, sys.stderr))
    numbers = ",".join(map(str, files))
    environment = (b"=".join(entry) for entry in os.environb.items())
    words = [os.fsencode(word) for word in arguments]
    return [version(), numbers.encode(), *streams, b"%d" % len(words), *words, *environment]


def _encoding(stream: TextIO | None) -> bytes:
    # None: the file descriptor was closed when Python began.
    return f"{stream.encoding}:{stream.errors}".encode() if stream else b""


def _inherited() -> list[int]:
    # The files inherited from the parent; Python closes its own on exec.
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with suppress(OSError):  # the listing's own
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
            "ovr: the standby process has died, and the restore with it"
            " (`ovr ps` shows whether the tree runs; `ovr warm` starts another)",
            file=sys.stderr,
        )
        return 1
    if status < 0:  # killed by this signal, which our parent must see
        with suppress(OSError):  # SIGKILL cannot be set
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
        return 128 - status  # it is blocked
    return status
