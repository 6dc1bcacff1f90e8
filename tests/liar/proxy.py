"""An agent that lies: between `ovr` and the real one, it changes what the real one says.

It listens where a vhost-device-vsock would, and passes frames on in both directions, but for one
lie. What is asked of the agent may be kept from it, too.
"""

import random
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ovr.guest import protocol
from ovr.guest.client.link import open_link
from ovr.guest.message import Message
from ovr.guest.wire import decode, encode

Lie = Callable[[Message, random.Random], "bytes | None"]
"""Makes what is said instead of a message, or None where it is passed on."""


def _changed(kind: type[Message], **changes: object) -> Lie:
    def change(message: Message, chance: random.Random) -> bytes | None:
        if not isinstance(message, kind):
            return None
        values = {k: v(message, chance) if callable(v) else v for k, v in changes.items()}
        return encode(message.replace(**values))

    return change


def _instead(kind: type[Message], answer: Message) -> Lie:
    return lambda message, chance: encode(answer) if isinstance(message, kind) else None


def _nonsense(message: Message, chance: random.Random) -> bytes | None:
    if isinstance(message, protocol.Welcome):
        return None
    data = bytearray(encode(message))
    for _ in range(4):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def _somewhere(message: Message, chance: random.Random) -> int:
    return chance.choice([0, 1 << 12, 1 << 40, (1 << 47) - 4096, 1 << 63, (1 << 64) - 4096])


SAID: dict[str, Lie] = {
    "root is nobody": _changed(protocol.Stopped, root_pid=4_000_000),
    "root is zero": _changed(protocol.Stopped, root_pid=0),
    "root is too large": _changed(protocol.Stopped, root_pid=(1 << 64) - 1),
    "root is a kernel thread": _changed(protocol.Stopped, root_pid=2),
    "no tasks": _changed(protocol.Stopped, tasks=()),
    "wrong tasks": _changed(protocol.Stopped, tasks=(1, 2, 3, (1 << 64) - 1)),
    "stopped before it is": _instead(protocol.Touched, protocol.Stopped(1, 1, (1,), 0, "")),
    "mapped in pid 1": _changed(protocol.Mapped, pid=1),
    "mapped in nobody": _changed(protocol.Mapped, pid=4_000_000),
    "mapped somewhere": _changed(protocol.Mapped, address=_somewhere),
    "touch has failed": _instead(
        protocol.Touched, protocol.Error("system", "cannot touch: \x1b[31m\n no")
    ),
    "restored another": _changed(protocol.Restored, pid=1),
    "gone, it says": _instead(protocol.Touched, protocol.Aborted("host", "for no reason", True)),
    "not gone, it says": _instead(
        protocol.Touched, protocol.Aborted("host", "for no reason", False)
    ),
    "another process's secret": _changed(protocol.Welcome, pid=1),
    "a secret in no memory": _changed(protocol.Welcome, secret_at=_somewhere),
    "a secret of the kernel's": _changed(protocol.Welcome, pid=2),
    "another nonce": _changed(protocol.Welcome, nonce=bytes(protocol.NONCE_SIZE)),
    "a proof of nothing": _changed(protocol.Proved, proof=bytes(protocol.PROOF_SIZE)),
    "held by another": _changed(protocol.Stopped, criu_pid=1),
    "held by nobody": _changed(protocol.Stopped, criu_pid=4_000_000),
    "nonsense": _nonsense,
}
"""Replacements of the agent's messages."""

KEPT: dict[str, tuple[type[Message], Message]] = {
    "touched without touching": (protocol.Touch, protocol.Touched()),
    "mapped without mapping": (protocol.Map, protocol.Mapped(1, 1 << 40)),
    "gone without going": (protocol.Go, protocol.Restored(1)),
}
"""Messages kept from the agent, and the answers given in its place."""

LIES = (*SAID, *KEPT)


class LyingAgent:
    """A thread that serves one session; a context manager.

    Args:
        agent: the real one's address.
        path: where to listen.
        lie: one of `LIES`.
        seed: of chance.
    """

    def __init__(self, agent: str, path: Path, lie: str, seed: str) -> None:
        self.told = 0
        self._agent, self._lie = agent, lie
        self._chance = random.Random(seed)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "LyingAgent":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(30)

    def _serve(self) -> None:
        try:
            host, _ = self._listener.accept()
        except OSError:
            return
        with host, open_link(self._agent, 30.0) as link:
            agent = link._socket
            agent.setblocking(True)
            while not host.recv(1).endswith(b"\n"):
                pass
            host.sendall(b"OK 1\n")
            back = threading.Thread(target=self._pass, args=(agent, host, self._said), daemon=True)
            back.start()
            self._pass(host, agent, lambda message: self._kept(message, host))
            with suppress(OSError):
                agent.shutdown(socket.SHUT_RDWR)
            back.join(30)

    def _pass(
        self, source: socket.socket, target: socket.socket, change: Callable[[Message], bytes]
    ) -> None:
        stream = source.makefile("rb")
        with suppress(OSError):
            while len(head := stream.read(4)) == 4:
                body = stream.read(int.from_bytes(head, "big"))
                target.sendall(change(decode(body)))
            target.shutdown(socket.SHUT_WR)

    def _said(self, message: Message) -> bytes:
        lie = SAID.get(self._lie)
        said = lie(message, self._chance) if lie else None
        self.told += said is not None
        return encode(message) if said is None else said

    def _kept(self, message: Message, host: socket.socket) -> bytes:
        kind, answer = KEPT.get(self._lie, (None, None))
        if kind is None or not isinstance(message, kind):
            return encode(message)
        assert answer is not None
        self.told += 1
        host.sendall(encode(answer))
        return b""
