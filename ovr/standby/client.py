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

from ovr.credentials import peer_of
from ovr.standby.messages import (
    FILES,
    StandbyError,
    address,
    receive,
    send,
    version,
)

__all__ = ["connect", "notes", "restore_there"]

_PATIENCE: Final = 1.0  # seconds, until it is ready; then the restore takes what it takes
_FORWARDED: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)

notes: list[str] = []
"""For the log: that a process that stood by does this, or why not; empty if there is none."""


def restore_there(arguments: Sequence[str]) -> int | None:
    """Have the process that stands by run ``ovr`` with these arguments, as if this one did.

    It gets this process's open files, directory and environment, and the signals that end it. If
    this process dies, that one is killed.

    Returns:
        The exit code, or None: nobody stands by, or not for this; nothing has been done.
    """
    try:
        server = connect()
    except OSError:
        return None
    with server:
        try:
            files = _inherited()
            send(server, [b"restore", *_request(arguments, files)], files)
            answer, _ = receive(server)
            if answer != [b"ready"]:
                raise StandbyError(b" ".join(answer[1:]).decode(errors="replace"))
        except (OSError, StandbyError) as error:
            notes.append(f"the process that stands by does not do this: {error}")
            return None
        return _run(server)


def connect() -> socket.socket:
    """Return a connection to the process that stands by.

    Raises:
        OSError: there is none, or it is another user's.
    """
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.settimeout(_PATIENCE)
        server.connect(address())
        _, uid = peer_of(server)
        if uid != os.geteuid():
            raise ConnectionRefusedError("another user's")
    except BaseException:
        server.close()
        raise
    return server


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


def _run(server: socket.socket) -> int:
    server.settimeout(None)
    for number in _FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: server.send(bytes([number])) and None)
    try:
        server.sendall(b"\0")
        answer, _ = receive(server)
        status = int(answer[1])
    except (OSError, StandbyError, ValueError, IndexError):
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
