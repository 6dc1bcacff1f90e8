"""Messages on a Unix socket. Imports little: each restore waits for it.

A message is the length of its text (u32, little-endian), then its fields, joined by NUL bytes,
which no field contains. File descriptors come with the length. Each piece carries the sender's
credentials (SCM_CREDENTIALS, unix(7)), checked by the kernel.

=======================  ===========================  ==========================================
client                   server
=======================  ===========================  ==========================================
``hello CHALLENGE``      ``hello CHALLENGE``          both at once, see `proof`
``proof CHALLENGE``      ``welcome CHALLENGE``        each with the challenge of the other
``keep VERSION PID``     ``done``                     see `keep`; ``drop`` likewise
``restore VERSION …``    ``ready``                    see `client`
``go``                   ``ended STATUS``             as `os.waitstatus_to_exitcode` has it
=======================  ===========================  ==========================================

An answer may also be ``no REASON``. After ``go`` the client sends a byte for each
signal that it receives.
"""

import os
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

__all__ = ["FILES", "Inbox", "Message", "StandbyError", "close_all", "send", "version"]

FILES: Final = 200
"""The most file descriptors in a message; the kernel takes SCM_MAX_FD (253)."""

_LENGTH: Final = struct.Struct("<I")
_SENDER: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_SHORT: Final = 4096
_MOST: Final = 8 << 20  # the kernel takes 6 MiB of arguments and environment at most (execve(2))


class StandbyError(Exception):
    """The other side breaks the protocol, refuses, or is not the expected process."""


class Message(NamedTuple):
    """A received message.

    Attributes:
        fields: its text.
        files: descriptors that are closed on exec; the receiver closes them.
        sender: the pid and effective user id of the sender, at the time of sending.
    """

    fields: Sequence[bytes]
    files: Sequence[int]
    sender: tuple[int, int]

    def argument(self, word: bytes) -> bytes:
        """Return the second of two fields of which the first is `word`.

        Raises:
            StandbyError: it is another message; a refusal's text is the reason.
        """
        if self.fields[0] == b"no":
            raise StandbyError(b" ".join(self.fields[1:]).decode(errors="replace"))
        if len(self.fields) != 2 or self.fields[0] != word:
            raise StandbyError(f"invalid message in place of {word.decode()}")
        return self.fields[1]


def version() -> bytes:
    """Return the version that both sides must share: Python, `ovr`, and the encoding of names."""
    encoding = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
    # The prefix is the virtual environment's: its Python goes by several names.
    parts = (sys.prefix, sys.version, os.path.dirname(__file__), *encoding)  # noqa: PTH120
    return "\n".join(parts).encode(errors="surrogateescape")


def send(to: socket.socket, fields: Sequence[bytes], files: Sequence[int] = ()) -> None:
    """Send one message.

    Raises:
        StandbyError: a field has a NUL byte.
        OSError: it cannot be sent, or not within the socket's timeout.
    """
    text = b"\0".join(fields)
    if text.count(b"\0") != len(fields) - 1:
        raise StandbyError("a field has a NUL byte")
    message = memoryview(_LENGTH.pack(len(text)) + text)
    sender = _SENDER.pack(os.getpid(), os.geteuid(), os.getegid())
    said = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, sender)]
    rights = struct.pack(f"{len(files)}i", *files)
    given = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if files else []
    while message:
        message = message[to.sendmsg([message], [*said, *given]) :]
        given = []


class Inbox:
    """The messages received on a connection, all from one process.

    Args:
        source: the connection; with a timeout, or non-blocking.
    """

    def __init__(self, source: socket.socket) -> None:
        source.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._source = source
        self._sender: tuple[int, int] | None = None
        self._most = _SHORT
        self._data = bytearray()
        self._length = 0  # of the text, where it is known
        self._files: list[int] = []

    def trust(self) -> None:
        """Accept long messages and file descriptors from now on."""
        self._most = _MOST

    def wait(self) -> Message:
        """Return the next message, on a blocking connection.

        Raises:
            StandbyError: the connection has ended, or it is no message.
            OSError: it cannot be received, or not within the socket's timeout.
        """
        while True:
            if message := self.receive():
                return message

    def receive(self) -> Message | None:
        """Receive once; return the message if it is complete.

        Raises:
            StandbyError: the connection has ended, or it is no message.
            BlockingIOError: no data is there.
            OSError: it cannot be received.
        """
        data = self._receive(self._missing)
        if not data:
            raise StandbyError("the other side has gone")
        self._data += data
        if len(self._data) == _LENGTH.size and not self._length:
            self._length = int.from_bytes(self._data, "little")
            if not 0 < self._length <= self._most:
                raise StandbyError("invalid message")
        if self._missing:
            return None
        fields = bytes(self._data[_LENGTH.size :]).split(b"\0")
        message = Message(fields, self._files, self._sender or (0, -1))
        self._data, self._length, self._files = bytearray(), 0, []
        return message

    def close(self) -> None:
        """Close the descriptors of an incomplete message."""
        close_all(self._files)
        self._files = []

    @property
    def _missing(self) -> int:
        return _LENGTH.size + self._length - len(self._data)

    def _receive(self, size: int) -> bytes:
        # With SO_PASSCRED, a read returns bytes of one sender only.
        room = socket.CMSG_SPACE(_SENDER.size) + socket.CMSG_SPACE(FILES * 4)
        data, controls, flags, _ = self._source.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
        sender: tuple[int, int] | None = None
        for _, kind, content in controls:
            if kind == socket.SCM_RIGHTS:
                self._files += struct.unpack(f"{len(content) // 4}i", content)
            elif kind == socket.SCM_CREDENTIALS:
                pid, uid, _ = _SENDER.unpack(content)
                sender = pid, uid
        if flags & socket.MSG_CTRUNC or (self._files and self._most < _MOST):
            raise StandbyError("invalid message")
        if data and sender != (self._sender or sender):
            raise StandbyError("a message comes from another process")
        self._sender = sender or self._sender
        return data


def close_all(files: Sequence[int]) -> None:
    """Close file descriptors."""
    for fd in files:
        with suppress(OSError):
            os.close(fd)
