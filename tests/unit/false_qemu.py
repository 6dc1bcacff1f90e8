"""A process that plays QEMU: it listens at a QMP socket, and says of its memory what a test wants.

It is a fork of the test, which may become another user.
"""

import ctypes
import json
import mmap
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NOBODY = 65534
SIZE = 16 << 12
_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip


def mapped(fd: int, *, kind: int = mmap.MAP_SHARED, prot: int = 3, size: int = SIZE) -> int:
    """Map a file without keeping another descriptor of it, as mmap.mmap does; the address."""
    address = _libc.mmap(None, size, prot, kind, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return address


def unmap(address: int, size: int) -> None:
    """End what was mapped there."""
    assert _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0


class FalseQemu:
    """A process that poses as QEMU, in a fork.

    Attributes:
        address: where "RAM" is mapped.
        size: how much of it there is.
        listening: called once it listens.
        signalled: called at each SIGUSR1.
    """

    def __init__(self) -> None:
        self.address, self.size = 0, SIZE
        self.listening: Callable[[], None] = lambda: None
        self.signalled: Callable[[], None] = lambda: None

    def answer(self, command: str, arguments: dict[str, str]) -> object:
        if command == "query-memdev":
            return [{"id": "ram0", "share": True}]
        if command == "query-status":
            return {"status": "running"}
        line = arguments.get("command-line", "")
        if line.startswith("info mtree"):
            return (
                'FlatView #0\r\n AS "memory", root: system\r\n'
                f"  {0:016x}-{self.size - 1:016x} (prio 0, ram): ram0\r\n"
            )
        if line.startswith("gpa2hva"):
            return f"Host virtual address for 0x0 (ram0) is {self.address:#x}\r\n"
        return {}

    def serve(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            with suppress(OSError), connection, connection.makefile("rwb") as stream:
                stream.write(b'{"QMP": {}}\n')
                stream.flush()
                for words in stream:
                    asked = json.loads(words)
                    said = self.answer(asked["execute"], asked.get("arguments", {}))
                    stream.write(json.dumps({"return": said, "id": asked["id"]}).encode() + b"\n")
                    stream.flush()


def become(uid: int, saved: int | None = None) -> None:
    """Change the user of this process; it may come back as the user `saved`."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid if saved is None else saved)


@contextmanager
def false_qemu(path: Path, play: Callable[[FalseQemu], None]) -> Iterator[int]:
    """Run one at the socket `path`, which `play` sets up in the fork; gives its pid."""
    ready, done = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            qemu = FalseQemu()
            play(qemu)
            signal.signal(signal.SIGUSR1, lambda *_: qemu.signalled())
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                path.chmod(0o666)
                listener.listen()
                qemu.listening()
                os.write(done, b"x")
                qemu.serve(listener)
        finally:
            os._exit(1)
    os.close(done)
    try:
        assert os.read(ready, 1), "the false QEMU could not be set up"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
