"""Targets: what the agent in the guest sends."""

import hmac
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, get_type_hints

from ovr.errors import OvrError
from ovr.guest import protocol
from ovr.guest.client.link import Address, Link
from ovr.guest.client.requests import Portion
from ovr.guest.message import Message
from ovr.guest.protocol import Touching
from ovr.guest.wire import ProtocolError, decode, encode
from ovr.lab.agent import LabAgent
from tests.fuzz.target import Input, Target

__all__ = ["TARGETS", "answered", "as_input", "samples"]

VALUES: dict[Any, Any] = {
    int: 7,
    str: "Ä text",
    bytes: bytes(range(16)),
    bool: True,
    tuple[int, ...]: (0, 4096, 1 << 40),
    tuple[str, ...]: ("--verbose", ""),
    tuple[bytes, ...]: (b"", b"\0\xff"),
}


def samples() -> list[Message]:
    """One message of each kind, all fields given."""
    made = []
    for kind in Message.__subclasses__():
        hints = get_type_hints(kind)
        values = {}
        for name in kind.field_names:
            hint = hints[name]
            values[name] = next(
                value for known, value in VALUES.items() if hint in (known, known | None)
            )
        made.append(kind(**values))
    return made


def frame(data: bytes) -> None:
    """A frame's body: what is decoded is encoded as the same."""
    message = decode(data)
    assert decode(encode(message)[4:]) == message


def frame_seeds() -> Iterator[bytes]:
    for message in samples():
        yield encode(message)[4:]


class Script(Link):
    """A link to an agent that says what the input says, in pieces of its sizes, and hangs up."""

    def __init__(self, serial: bool, said: list[bytes]) -> None:
        self._sockets = socket.socketpair()
        kind = Address("serial", path="/s") if serial else Address("vsock", cid=3)
        super().__init__(kind, self._sockets[0])
        self._said = said
        self.token = b""

    def close(self) -> None:
        super().close()
        self._sockets[1].close()

    def send(self, data: Any, deadline: float, *, on_input: Any = None) -> None:
        self.token = self.token or bytes(data)[-protocol.TOKEN_SIZE :]  # the hello's last field
        if on_input and self._said:
            on_input(self._next())

    def receive(self, deadline: float) -> bytes:
        if not self._said:
            raise self._lost("hung up")
        return self._next()

    def readable(self, seconds: float = 0.0) -> bool:
        return bool(self._said) or seconds > 0  # a link that hung up is readable

    def _next(self) -> bytes:
        said = self._said.pop(0).replace(b"TOKENTOKENTOKENT", self.token)
        text = protocol.proof_text(protocol.PROOF_OF_AGENT, self.token, NONCE)
        return said.replace(PROOF, hmac.digest(SECRET, text, "sha256"))


@contextmanager
def answered(data: bytes) -> Iterator[Script]:
    """A link to an agent that answers with the input."""
    source = Input(data)
    shape = source.number()
    said = []
    while source:
        said.append(source.bytes(1 + source.number(2)))
    link = Script(bool(shape & 1), said)
    try:
        yield link
    finally:
        link.close()


def session(data: bytes) -> None:
    """All that a host does in a restore, with an agent that answers with the input."""
    with answered(data) as link:
        agent = LabAgent(link, 5.0)
        for step in (
            agent.ping,
            lambda: agent.authenticate(SECRET),
            lambda: agent.begin({"core-1.img": b"x" * 10, "pages-1.img": [b"y", b""]}),
            lambda: agent.touch([Portion(1, Touching.DISCARD, [(0, 4096)])]),
            lambda: agent.map(1, "fd/3", 8192, [(0, 4096)]),
            lambda: agent.run(["true"], input=b"in"),
            agent.go,
            agent.abort,
        ):
            with suppress(OvrError):
                step()


NONCE = bytes(protocol.NONCE_SIZE)
SECRET = bytes(protocol.SECRET_SIZE)
PROOF = b"PROOFPROOFPROOFPROOFPROOFPROOFPR"


WELCOME = encode(
    protocol.Welcome(
        protocol.VERSION,
        b"TOKENTOKENTOKENT",
        NONCE,
        "0.1.0",
        True,
        "6.12",
        "4.1",
        1,
        4096,
        "id",
        True,
        1 << 40,
        0,
        0,
    )
)


def as_input(answers: Sequence[bytes], *, serial: bool) -> bytes:
    """The input of an agent that greets, and gives these answers."""
    marker = [protocol.MAGIC + b"TOKENTOKENTOKENT"] if serial else []
    return bytes([serial]) + b"".join(
        (len(piece) - 1).to_bytes(2, "little") + piece for piece in (*marker, WELCOME, *answers)
    )


def session_seeds() -> Iterator[bytes]:
    answers = {type(message).__name__: encode(message) for message in samples()}
    kinds = ("Stopped", "Touched", "Mapped", "Exited", "Restored", "Aborted")
    proved = encode(protocol.Proved(PROOF))
    good = [encode(protocol.Pong(1)), proved, *(answers[kind] for kind in kinds)]
    for serial in (0, 1):
        for answer in ([], *([a] for a in answers.values()), good):
            yield as_input(answer, serial=bool(serial))


TARGETS = (
    Target("frame", frame_seeds, frame, (ProtocolError,)),
    Target("session", session_seeds, session),
)
