"""How long the host waits for an agent, and for what."""

import socket
import time

import pytest

from ovr.errors import AgentUnreachable
from ovr.guest import protocol
from ovr.guest.client.agent import Agent
from tests.unit.agent_peer import frame, peer, read_message, replying


def test_silence() -> None:
    with peer(lambda connection: None) as link:
        agent = Agent(link, 0.3)
        with pytest.raises(AgentUnreachable, match="does not answer"):
            agent.ping()


def test_an_answer_drop_by_drop_has_no_more_time() -> None:
    def script(connection: socket.socket) -> None:
        for _ in range(600):
            connection.sendall(b"\0")
            time.sleep(0.05)

    with peer(script) as link:
        agent = Agent(link, 0.5)
        start = time.monotonic()
        with pytest.raises(AgentUnreachable):
            agent.ping()
        assert time.monotonic() - start < 15  # all of it takes 30


def test_the_guest_may_take_its_time() -> None:
    """Longer than any answer may take: the agent answers pings meanwhile."""

    def script(connection: socket.socket) -> None:
        assert isinstance(read_message(connection), protocol.Warm)
        for _ in range(15):
            ping = read_message(connection)
            assert isinstance(ping, protocol.Ping)
            connection.sendall(frame({"op": "pong", "number": ping.number}))
        warmed = {"size": 0, "huge": 0, "pid": 7, "address": 0, "note": ""}
        connection.sendall(frame({"op": "warmed", **warmed}))

    with peer(script) as link:
        assert Agent(link, 0.2).warm(0).pid == 7


def test_the_agent_must_answer_pings() -> None:
    def script(connection: socket.socket) -> None:
        read_message(connection)

    with peer(script) as link:
        agent = Agent(link, 0.2)
        with pytest.raises(AgentUnreachable, match="does not answer"):
            agent.warm(0)


PONG = frame({"op": "pong", "number": 0})


def test_answers_to_pings_take_no_more_time() -> None:
    def flood(connection: socket.socket) -> None:
        while True:
            connection.sendall(PONG * 1000)

    with peer(flood, greet=False) as link, pytest.raises(AgentUnreachable):
        Agent(link, 0.3)
    with peer(flood) as link:
        agent = Agent(link, 0.3)
        with pytest.raises(AgentUnreachable):
            agent.ping()


def test_an_agent_that_only_answers_pings_does_not_hold_up_an_abort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ovr.guest.client.agent._ABORT_SECONDS", 0.3)

    def script(connection: socket.socket) -> None:
        while True:
            message = read_message(connection)
            if isinstance(message, protocol.Ping):
                connection.sendall(frame({"op": "pong", "number": message.number}))

    with peer(script) as link:
        agent = Agent(link, 0.2)
        with pytest.raises(AgentUnreachable, match="does not answer"):
            agent.abort()


def test_an_answer_to_a_ping_is_no_news() -> None:
    more = frame({"op": "restored", "pid": 7})
    with peer(replying(PONG * 9, PONG + more)) as link:
        agent = Agent(link, 2.0)
        agent._send(protocol.Ping(0))
        assert agent._link.readable(5.0)
        assert not agent._has_news()
        agent._send(protocol.Ping(0))
        while not agent._has_news():
            assert agent._link.readable(5.0)
        assert isinstance(agent._receive(0.0), protocol.Restored)
