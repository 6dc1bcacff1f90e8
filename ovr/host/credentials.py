"""Who is at the other end of a Unix socket. Imports little: each restore waits for it."""

import socket
import struct
from typing import Final

__all__ = ["peer_of"]

_UCRED: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the other side; the kernel says so (SO_PEERCRED, unix(7)).

    That is who called connect(2) or listen(2), as they were then. The pid is 0 if that process is
    in a pid namespace that cannot be seen from here.
    """
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(found)
    return pid, uid
