"""Messages on a Unix socket, and where that is. Imports little: each restore waits for it.

A message is the length of its text (u32, little-endian), then its fields, joined by NUL bytes, of
which they have none, as those of a command line. File descriptors come with the length.

A client says ``restore VERSION …`` (`client`), ``keep VERSION PID`` or ``drop VERSION PID``
(`keep`). The answer is ``ready``, ``done`` or ``no REASON``. To ``ready`` the client answers with a
byte that is 0, and then with one for each signal that it gets; at the end it hears
``ended STATUS``, as `os.waitstatus_to_exitcode` has it.
"""

import os
import socket
import struct
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

__all__ = [
    "FILES",
    "StandbyError",
    "address",
    "close_all",
    "receive",
    "send",
    "version",
]

FILES: Final = 200
"""The most file descriptors in a message; the kernel takes SCM_MAX_FD (253)."""

_LENGTH: Final = struct.Struct("<I")
_MOST: Final = 8 << 20  # the kernel takes 6 MiB of arguments and environment at most (execve(2))


class StandbyError(Exception):
    """The other side does not say what it should, or nothing."""


def version() -> bytes:
    """Return what both sides have in common: this Python, this `ovr`, how names are encoded."""
    encoding = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
    # The prefix is the virtual environment's: its Python goes by several names.
    parts = (sys.prefix, sys.version, os.path.dirname(__file__), *encoding)  # noqa: PTH120
    return "\n".join(parts).encode(errors="surrogateescape")


def address() -> str:
    """Return the socket's address: an abstract one, so nothing is left when its process ends.

    It is of the network namespace, and anybody may take it: both sides ask who the other is.
    """
    return f"\0ovr-standby/{os.geteuid()}/{zlib.crc32(version()):08x}"


def send(to: socket.socket, fields: Sequence[bytes], files: Sequence[int] = ()) -> None:
    """Send one message.

    Raises:
        StandbyError: a field has a NUL byte.
        OSError: it cannot be sent; the socket's timeout counts.
    """
    text = b"\0".join(fields)
    if text.count(b"\0") != len(fields) - 1:
        raise StandbyError("a field has a NUL byte")
    message = _LENGTH.pack(len(text)) + text
    sent = socket.send_fds(to, [message], files)
    if sent < len(message):  # even an empty one fails where the other side has its answer and goes
        to.sendall(message[sent:])


def receive(source: socket.socket) -> tuple[list[bytes], list[int]]:
    """Receive one message: fields, and file descriptors that are closed on exec.

    Raises:
        StandbyError: the other side has gone, or it is no message.
        OSError: it cannot be received; the socket's timeout counts.
    """
    head, files, flags, _ = socket.recv_fds(
        source, _LENGTH.size, FILES, socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC
    )
    try:
        if len(head) < _LENGTH.size:
            raise StandbyError("the other side has gone")
        (length,) = _LENGTH.unpack(head)
        if length > _MOST or flags & socket.MSG_CTRUNC:
            raise StandbyError("that is no message")
        return _exactly(source, length).split(b"\0"), files
    except BaseException:
        close_all(files)
        raise


def _exactly(source: socket.socket, length: int) -> bytes:
    parts = []
    while length:
        part = source.recv(length)
        if not part:
            raise StandbyError("the other side has gone")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def close_all(files: Sequence[int]) -> None:
    """Close file descriptors."""
    for fd in files:
        with suppress(OSError):
            os.close(fd)
