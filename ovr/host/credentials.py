"""Credentials of the peer of a Unix socket. Imports little: each restore waits for it."""

import socket
import struct
from typing import Final

__all__ = ["peer_of"]

_UCRED: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the peer, as known to the kernel (SO_PEERCRED, unix(7)).

    They are those of the process that called connect(2) or listen(2), at that time. The pid is 0
    if the process is in a pid namespace that cannot be seen from here.
    """
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(found)
    return pid, uid
