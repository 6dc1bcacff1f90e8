"""The host's side against peers that lie, and the protocol by itself."""

import hmac
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovr.errors import AgentUnreachable, AgentUntrusted, AttemptFailed, CriuFailed, LabError
from ovr.guest import lab_protocol, protocol, wire
from ovr.guest.client.agent import Agent
from ovr.guest.message import Message
from ovr.lab.agent import LabAgent
from tests.unit.agent_peer import WELCOME, frame, peer, read_message, replying

NONSENSE = {
    "garbage": b"\0\0\0\x03abc",
    "empty frame": bytes(4),
    "huge frame": b"\xff\xff\xff\xff",
    "no map": frame([]),
    "no op": frame({"a": 1}),
    "op of another type": frame({"op": []}),
    "unknown op": frame({"op": "bogus"}),
    "unknown field": frame({"op": "pong", "number": 1, "x": 2}),
    "missing field": frame({"op": "pong"}),
    "wrong type": frame({"op": "pong", "number": "1"}),
    "bool for a number": frame({"op": "pong", "number": True}),
    "negative": frame({"op": "pong", "number": -1}),
    "no utf-8": b"\0\0\0\x18\x83\xa2op\xa5error\xa4code\xa1x\xa4text\xa1\xff",
    "repeated field": b"\0\0\0\x19\x83\xa2op\xa4pong\xa6number\x01\xa6number\x01",
    "not hashable key": b"\0\0\0\x03\x81\x90\x01",
    "deep": b"\0\0\x10\0" + b"\x91" * 4096,
    "a lie about a length": b"\0\0\0\x05\xdd\xff\xff\xff\xff",
    "extension type": b"\0\0\0\x03\xd4\x01\x02",
    "a question": frame({"op": "go"}),
}


@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense(answer: bytes) -> None:
    with peer(replying(answer), greet=False) as link, pytest.raises(AgentUnreachable):
        Agent(link, 2.0)
    with peer(replying(answer)) as link:
        agent = Agent(link, 2.0)
        with pytest.raises(AgentUnreachable, match="violated the protocol") as caught:
            agent.go()
        assert "\n" not in str(caught.value)
        assert caught.value.hint


# The machine may be busy: what counts here is what happens, not how fast.
patiently = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@patiently
@given(noise=st.binary(max_size=200))
def test_random_answers(noise: bytes) -> None:
    with peer(replying(len(noise).to_bytes(4, "big") + noise)) as link:
        agent = Agent(link, 2.0)
        with pytest.raises((AgentUnreachable, AttemptFailed)):
            agent.go()


def test_somebody_elses_welcome() -> None:
    answer = frame({**WELCOME, "token": b"not the one given"[:16]})
    with (
        peer(replying(answer), greet=False) as link,
        pytest.raises(AgentUnreachable, match="another session"),
    ):
        Agent(link, 2.0)


def test_refused_hello() -> None:
    answer = frame({"op": "error", "code": "version", "text": "the agent speaks\nversion 9"})
    with (
        peer(replying(answer), greet=False) as link,
        pytest.raises(AgentUnreachable, match=r"speaks\?version 9"),
    ):
        Agent(link, 2.0)


SECRET = bytes(range(protocol.SECRET_SIZE))


def proof_by(secret: bytes, side: bytes, token: bytes) -> bytes:
    nonce = WELCOME["nonce"]
    return hmac.digest(secret, protocol.proof_text(side, token, nonce), "sha256")


@contextmanager
def asked_to_prove(
    answer: Callable[[protocol.Prove, bytes], bytes],
) -> Iterator[tuple[Agent, list[Message]]]:
    """An agent that answers to a proof; and what it heard."""
    heard: list[Message] = []

    def script(connection: socket.socket) -> None:
        heard.append(read_message(connection))
        assert isinstance(heard[0], protocol.Prove)
        connection.sendall(answer(heard[0], agent._token))
        heard.append(read_message(connection))

    with peer(script) as link:
        agent = Agent(link, 2.0)
        yield agent, heard


def test_both_sides_prove_that_they_know_the_secret() -> None:
    def answer(prove: protocol.Prove, token: bytes) -> bytes:
        assert prove.proof == proof_by(SECRET, protocol.PROOF_OF_HOST, token)
        return frame({"op": "proved", "proof": proof_by(SECRET, protocol.PROOF_OF_AGENT, token)})

    with asked_to_prove(answer) as (agent, heard):
        agent.authenticate(SECRET)
        agent._send(protocol.Alive())
    assert isinstance(heard[1], protocol.Alive)


PROOFS: dict[str, Callable[[protocol.Prove, bytes], bytes]] = {
    "none": lambda prove, token: b"",
    "zeros": lambda prove, token: bytes(protocol.PROOF_SIZE),
    "the host's own": lambda prove, token: prove.proof,
    "another secret's": lambda prove, token: proof_by(bytes(32), protocol.PROOF_OF_AGENT, token),
    "another session's": lambda prove, token: proof_by(
        SECRET, protocol.PROOF_OF_AGENT, bytes(protocol.TOKEN_SIZE)
    ),
    "one byte too many": lambda prove, token: (
        proof_by(SECRET, protocol.PROOF_OF_AGENT, token) + b"x"
    ),
}


@pytest.mark.parametrize("what", PROOFS)
def test_who_does_not_know_the_secret_is_not_the_agent(what: str) -> None:
    def answer(prove: protocol.Prove, token: bytes) -> bytes:
        return frame({"op": "proved", "proof": PROOFS[what](prove, token)})

    with asked_to_prove(answer) as (agent, heard):
        with pytest.raises(AgentUntrusted) as caught:
            agent.authenticate(SECRET)
        with pytest.raises(AgentUnreachable):
            agent.begin({"inventory.img": b"x"})  # it has hung up
    assert (caught.value.code, len(heard)) == ("proof", 1)


def test_an_agent_that_denies_the_hosts_proof_or_answers_something_else() -> None:
    refusals: dict[str, tuple[type[Exception], str]] = {
        "proof": (AgentUntrusted, "proof"), "busy": (AttemptFailed, "busy"),
    }  # fmt: skip
    for code, (kind, expected) in refusals.items():
        answer = frame({"op": "error", "code": code, "text": "no"})
        with (
            asked_to_prove(lambda prove, token, answer=answer: answer) as (agent, _),
            pytest.raises(kind) as caught,
        ):
            agent.authenticate(SECRET)
        assert caught.value.code == expected  # type: ignore[attr-defined]
    with (
        asked_to_prove(lambda prove, token: frame({"op": "pong", "number": 1})) as (agent, _),
        pytest.raises(AgentUnreachable, match="pong instead of proved"),
    ):
        agent.authenticate(SECRET)


def test_a_nonce_that_is_none() -> None:
    def script(connection: socket.socket) -> None:
        hello = read_message(connection)
        assert isinstance(hello, protocol.Hello)
        connection.sendall(frame({**WELCOME, "nonce": b"x", "token": hello.token}))

    with (
        peer(script, greet=False) as link,
        pytest.raises(AgentUnreachable, match="a nonce of 1 bytes"),
    ):
        Agent(link, 2.0)


def test_what_a_stranger_says_of_himself_is_one_line() -> None:
    def script(connection: socket.socket) -> None:
        hello = read_message(connection)
        assert isinstance(hello, protocol.Hello)
        lines = {"agent": "0\x1b[31m", "kernel": "6\n7", "criu": "4\t1" + "x" * 4000}
        connection.sendall(frame({**WELCOME, **lines, "token": hello.token}))

    with peer(script, greet=False) as link:
        hello = Agent(link, 2.0).hello
    for text in (hello.agent, hello.kernel, hello.criu):
        assert text is not None
        assert text.isprintable()
        assert len(text) <= 256


def test_hang_up() -> None:
    with peer(lambda connection: connection.close()) as link:
        agent = Agent(link, 2.0)
        with pytest.raises(AgentUnreachable):
            agent.ping()


def test_hostile_text_becomes_one_line() -> None:
    log = ["Error \x1b[31m\r\n" + "x" * 4000]
    failed = {"op": "failed", "status": 1, "log": log, "undone": True}
    with peer(replying(frame(failed))) as link, pytest.raises(CriuFailed) as caught:
        Agent(link, 2.0).go()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("op", ["failed", "aborted"])
def test_tasks_that_do_not_go_away(op: str) -> None:
    rest = {"status": 1, "log": ["Error"]} if op == "failed" else {"code": "host", "reason": "why"}
    with (
        peer(replying(frame({"op": op, "undone": False, **rest}))) as link,
        pytest.raises(AttemptFailed, match="do not end"),
    ):
        Agent(link, 2.0).go()


def test_keep_alive_and_requests_do_not_mix_their_bytes() -> None:
    seen: list[Message] = []

    def script(connection: socket.socket) -> None:
        while True:
            message = read_message(connection)
            seen.append(message)
            if isinstance(message, protocol.Ping):
                connection.sendall(frame({"op": "pong", "number": message.number}))

    with peer(script) as link:
        agent = Agent(link, 5.0)
        with agent.keep_alive(0.001):
            for _ in range(200):
                agent.ping()
    assert sum(isinstance(message, protocol.Ping) for message in seen) == 200
    assert any(isinstance(message, protocol.Alive) for message in seen)


def test_keep_alive_survives_the_link() -> None:
    with peer(lambda connection: connection.close()) as link:
        agent = Agent(link, 2.0)
        with agent.keep_alive(0.01):
            time.sleep(0.1)


def test_lab_methods_need_a_lab_build() -> None:
    def script(connection: socket.socket) -> None:
        hello = read_message(connection)
        assert isinstance(hello, protocol.Hello)
        connection.sendall(frame({**WELCOME, "lab_build": False, "token": hello.token}))

    with peer(script, greet=False) as link, pytest.raises(LabError):
        LabAgent(link, 2.0).run(["true"])


def test_output_on_a_stream_that_is_none() -> None:
    with (
        peer(replying(frame({"op": "output", "stream": 3, "data": b"x"}))) as link,
        pytest.raises(AgentUnreachable),
    ):
        LabAgent(link, 2.0).run(["true"])


# The protocol by itself ----------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50)
NUMBER = st.integers(0, (1 << 64) - 1)


@patiently
@given(
    st.one_of(
        st.builds(protocol.Hello, NUMBER, st.binary(max_size=20)),
        st.builds(protocol.Go),
        st.builds(
            protocol.Begin,
            st.lists(TEXT, max_size=5).map(tuple),
            NUMBER,
            NUMBER,
            NUMBER,
            st.booleans(),
            st.lists(TEXT, max_size=5).map(tuple),
        ),
        st.builds(
            protocol.Files,
            st.lists(TEXT, max_size=5).map(tuple),
            st.lists(st.binary(max_size=99), max_size=5).map(tuple),
        ),
        st.builds(
            protocol.Stopped, NUMBER, NUMBER, st.lists(NUMBER, max_size=9).map(tuple), NUMBER, TEXT
        ),
        st.builds(lab_protocol.Run, st.just(("a",)), st.none() | st.just(("B=c",)), NUMBER),
    )
)
def test_round_trip(message: Message) -> None:
    data = wire.encode(message)
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    assert wire.decode(data[4:]) == message


def test_a_message_with_other_values() -> None:
    message = protocol.Restored(7)
    assert message.replace(container="web") == protocol.Restored(7, "web")
    assert message == protocol.Restored(7)
    with pytest.raises(TypeError):
        message.replace(pods=1)


def test_what_cannot_be_sent() -> None:
    for message in (
        lab_protocol.Data(bytes(protocol.MAX_FRAME)),
        lab_protocol.Get("x" * protocol.MAX_STRING),
        lab_protocol.Get("a\0b"),
        protocol.Ping(-1),
        protocol.Ping(1 << 64),
        protocol.Files(("\udcff",), (b"",)),
    ):
        with pytest.raises(wire.ProtocolError):
            wire.encode(message)
    wire.encode(lab_protocol.Data(bytes(protocol.CHUNK)))


def test_header_compiles(tmp_path: Path) -> None:
    (tmp_path / "protocol.h").write_text(wire.header())
    (tmp_path / "x.c").write_text('#define PROTOCOL_TABLES\n#include "protocol.h"\n')
    subprocess.run(
        ["gcc", "-std=c11", "-Wall", "-Wno-unused", "-Werror", "-fsyntax-only", tmp_path / "x.c"],
        check=True,
    )
