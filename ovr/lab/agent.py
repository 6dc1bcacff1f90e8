"""The client of lab builds of the agent, which also run commands and copy files."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ovr.errors import LabError
from ovr.guest import lab_protocol, protocol
from ovr.guest.client.agent import Agent
from ovr.guest.client.session import one_line
from ovr.guest.message import Message
from ovr.guest.wire import ProtocolError
from ovr.host import UntrustedPath, locate

__all__ = ["Completed", "LabAgent"]


@dataclass(frozen=True)
class Completed:
    """The result of a command.

    Attributes:
        status: its exit status, or 128 plus the signal that killed it.
        stdout: its standard output.
        stderr: its standard error.
    """

    status: int
    stdout: bytes
    stderr: bytes


class LabAgent(Agent):
    """A session with an agent of the lab; one command or file at a time."""

    def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes = b"",
        timeout: float = 60.0,
        env: Sequence[str] | None = None,
    ) -> Completed:
        """Run a command in the guest, as root in ``/``.

        Args:
            argv: the program (looked up in PATH) and its arguments.
            input: its standard input.
            timeout: seconds after which it is killed with all of its process group.
            env: ``NAME=value``, instead of a small default environment.

        Raises:
            LabError: it cannot be started, or took too long.
            AgentUnreachable: the link broke.
        """
        self._request(lab_protocol.Run(tuple(argv), _env(env), int(timeout * 1000)))
        pieces = _pieces(input)
        self._send(lab_protocol.Stdin(next(pieces)))
        output: dict[int, list[bytes]] = {1: [], 2: []}
        deadline = self._deadline(timeout + self._timeout)
        while not isinstance(message := self._answer(deadline), lab_protocol.Exited):
            if isinstance(message, lab_protocol.Taken):
                self._send(lab_protocol.Stdin(next(pieces)))
            elif isinstance(message, lab_protocol.Output) and message.stream in output:
                output[message.stream].append(message.data)
                self._credit(message.data)
            else:
                raise self._broken(f"{message.op} while a command runs")
        if message.timed_out:
            raise LabError(f"{argv[0]} in the guest took longer than {timeout} s", "give it longer")
        return Completed(message.status, b"".join(output[1]), b"".join(output[2]))

    def spawn(
        self,
        argv: Sequence[str],
        *,
        output: str | None = None,
        env: Sequence[str] | None = None,
    ) -> int:
        """Start a detached process in the guest and return its pid.

        It has a session of its own and no input; its output goes to the guest's file `output`, or
        is discarded.

        Raises:
            LabError: it cannot be started.
            AgentUnreachable: the link broke.
        """
        self._request(lab_protocol.Spawn(tuple(argv), _env(env), output))
        message = self._answer(self._deadline(None))
        if not isinstance(message, lab_protocol.Spawned):
            raise self._broken(f"{message.op} instead of {lab_protocol.Spawned.op}")
        return message.pid

    def put(self, local: Path, remote: str, mode: int = 0o644) -> None:
        """Copy a file into the guest; an existing one is replaced.

        Raises:
            LabError: the guest cannot store it, or it cannot be read here.
            AgentUnreachable: the link broke.
        """
        size, refused = 0, False
        self._request(lab_protocol.Put(remote, mode))
        with _opened(local) as file:
            while piece := file.read(protocol.CHUNK):
                if refused := self._has_news():
                    break
                self._send(lab_protocol.Data(piece))
                size += len(piece)
            self._send(lab_protocol.Data(b""))
        # The last data may still be on its way to a slow disk.
        message = self._answer(self._deadline(self._timeout + 60))
        if not isinstance(message, lab_protocol.Stored) or message.size != size or refused:
            raise self._broken(f"{message.op} instead of {lab_protocol.Stored.op}")

    def get(self, remote: str, local: Path) -> None:
        """Copy a file out of the guest.

        Raises:
            LabError: the guest cannot read it, or it cannot be written here.
            AgentUnreachable: the link broke.
        """
        size = 0
        self._request(lab_protocol.Get(remote))
        message = self._answer(self._deadline(None))
        with _written(local) as file:
            while isinstance(message, lab_protocol.Data):
                file.write(message.data)
                size += len(message.data)
                self._credit(message.data)
                message = self._answer(self._deadline(None))
        if not isinstance(message, lab_protocol.End) or message.size != size:
            raise self._broken(f"{message.op} instead of {lab_protocol.End.op}")

    def _request(self, message: Message) -> None:
        if not self.hello.lab:
            raise LabError(
                "the agent in this guest does not run commands",
                "only those of lab VMs do: python -m ovr lab up",
            )
        try:
            self._send(message)
        except ProtocolError as error:
            raise LabError(f"this cannot be sent to the guest: {error}") from error

    def _answer(self, deadline: float) -> Message:
        message = self._receive(deadline)
        if isinstance(message, protocol.Error):
            raise LabError(f"in the guest: {one_line(message.text)}")
        return message

    def _credit(self, data: bytes) -> None:
        self._send(lab_protocol.Credit(len(data) + lab_protocol.FRAME_COST))


def _pieces(data: bytes) -> Iterator[bytes]:
    """The input in pieces, and then end of file, repeatedly."""
    for start in range(0, len(data), protocol.CHUNK):
        yield data[start : start + protocol.CHUNK]
    while True:
        yield b""


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise LabError(f"{path}: {error.strerror or error}") from error


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    try:
        directory, name = locate(path)
        with directory, os.fdopen(directory.overwrite(name), "wb") as file:
            yield file
    except OSError as error:
        hint = error.hint if isinstance(error, UntrustedPath) else ""
        raise LabError(f"{path}: {error.strerror or error}", hint) from error


def _env(env: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if env is None else tuple(env)
