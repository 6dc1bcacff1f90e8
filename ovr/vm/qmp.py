"""QMP, QEMU's machine protocol: one command at a time, over a unix socket.

Answers are checked as far as they are used: a peer that is not QEMU, sends invalid messages, closes
the connection or does not answer is `VmUnreachable`. Protocol: QEMU's docs/interop/qmp-spec.rst.
"""

import json
import select
import socket
import time
from abc import abstractmethod
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, Self

from ovr.errors import OvrError, VmUnreachable
from ovr.host.closing import Closing
from ovr.host.credentials import peer_of
from ovr.vm.lock import refuse_locked

__all__ = ["ExecuteError", "Monitor", "Qmp"]

_MESSAGE_LIMIT = 4 << 20  # bytes; QEMU's largest answers (query-qmp-schema) have 200 KiB
_HINT = "is this the QMP socket of a running QEMU, and is no other client connected to it?"


class ExecuteError(OvrError):
    """QEMU refused a command.

    Attributes:
        error_class: QMP's error class, such as ``GenericError`` or ``CommandNotFound``.
        desc: QEMU's message.
    """

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"QEMU refused {command}: {desc}")
        self.error_class = error_class
        self.desc = desc


class Monitor(Closing):
    """A channel for QMP commands, one at a time; a context manager."""

    @abstractmethod
    def close(self) -> None:
        """Disconnect; the VM runs on."""

    @property
    @abstractmethod
    def qemu_pid(self) -> int:
        """QEMU's pid, 0 if its process cannot be seen from here."""

    @property
    def owner(self) -> int | None:
        """The uid of the QMP server; None if another program vouches for `qemu_pid`."""
        return None

    @abstractmethod
    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return its ``return`` value.

        Python's ``_`` in the names of arguments stands for QMP's ``-``.

        Raises:
            ExecuteError: QEMU refused the command.
            VmUnreachable: the connection broke, or no answer came in time.
        """

    def ask(self, queries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Run queries, each with its arguments; None if QEMU refuses one or does not know it.

        Raises:
            VmUnreachable: the connection broke, or no answer came in time.
        """
        return {command: self._asked(command, queries[command]) for command in queries}

    def _asked(self, command: str, arguments: Mapping[str, Any]) -> Any:
        try:
            return self.execute(command, **arguments)
        except ExecuteError:
            return None

    def resets(self) -> int:
        """Return the number of resets of the machine reported since we connected.

        Never waits, so it may be called while QEMU is stopped. QEMU reports a reset before any vCPU
        runs on. Monitors without events return 0.
        """
        return 0

    def human(self, command_line: str) -> str:
        """Run a command of the human monitor and return its output."""
        return str(self.execute("human-monitor-command", command_line=command_line))

    def status(self) -> str:
        """Return the VM's run state, such as ``running``, ``paused`` or ``inmigrate``."""
        answer = self.execute("query-status")
        if not isinstance(answer, dict):
            raise self._unreachable("sent an answer that is not QMP")
        return str(answer.get("status"))

    @abstractmethod
    def _unreachable(self, what: str) -> VmUnreachable:
        """Return the error for this VM; `what` completes its sentence."""

    def _returned(self, command: str, answer: dict[str, Any]) -> Any:
        if "return" in answer:
            return answer["return"]
        error = answer.get("error")
        if not isinstance(error, dict):
            raise self._unreachable("sent an answer that is not QMP")
        raise ExecuteError(command, str(error.get("class")), str(error.get("desc")))

    @staticmethod
    def _message(command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = {key.replace("_", "-"): arguments[key] for key in arguments}
        return message


class Qmp(Monitor):
    """A QMP connection, past the greeting and ready for commands; a context manager.

    Args:
        connection: a connected unix stream socket.
        timeout: seconds to wait for the greeting and for each answer.
        name: the VM's name in error messages.

    Raises:
        VmUnreachable: the peer does not greet as QMP.
    """

    def __init__(self, connection: socket.socket, timeout: float, name: str) -> None:
        self._socket = connection
        self._timeout = timeout
        self._name = name
        self._buffer = bytearray()
        self._ids = count(1)
        self._resets = 0
        greeting = self._receive(time.monotonic() + timeout)
        if not isinstance(greeting.get("QMP"), dict):
            raise self._unreachable("does not greet as QMP")
        self.execute("qmp_capabilities")

    @classmethod
    def connect(cls, path: str | Path, timeout: float = 10.0) -> Self:
        """Connect to the QMP socket at `path`.

        Raises:
            VmUnreachable: no process listens there, or it is not QMP.
            CheckFailed: another `ovr` uses it for a restore.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout)
        try:
            connection.connect(str(path))
            return cls(connection, timeout, str(path))
        except OSError as error:
            connection.close()
            reason = error.strerror or str(error)
            raise VmUnreachable(f"no VM answers at {path}: {reason}", _HINT) from error
        except VmUnreachable:
            with connection:
                refuse_locked(peer_of(connection)[0])
            raise
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """Hang up; the VM runs on."""
        self._socket.close()

    def fileno(self) -> int:
        """The socket's file descriptor."""
        return self._socket.fileno()

    @property
    def qemu_pid(self) -> int:
        """The pid of the process that listens at the socket (``SO_PEERCRED``): QEMU.

        0 if that process is in a pid namespace that cannot be seen from here.
        """
        pid, _ = peer_of(self._socket)
        return pid

    @property
    def owner(self) -> int | None:
        """The uid of the process that listens at the socket, when it began to (``SO_PEERCRED``)."""
        _, uid = peer_of(self._socket)
        return uid

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return its ``return`` value; see `Monitor.execute`."""
        identity = next(self._ids)
        message = {**self._message(command, arguments), "id": identity}
        self._send(json.dumps(message).encode() + b"\n")
        return self._returned(command, self._answer(identity))

    def _answer(self, identity: int) -> dict[str, Any]:
        # Answers to earlier commands that timed out may still arrive; their ids differ.
        deadline = time.monotonic() + self._timeout
        while True:
            message = self._receive(deadline)
            if "event" in message:
                self._note(message)
            elif message.get("id") == identity:
                return message
            elif "error" in message and "id" not in message:
                raise self._unreachable("did not understand our QMP")

    def resets(self) -> int:
        """Return the number of resets since we connected; see `Monitor.resets`."""
        self._note_buffered()
        read = 0
        while select.select([self._socket], [], [], 0)[0]:
            if read > _MESSAGE_LIMIT or len(self._buffer) > _MESSAGE_LIMIT:
                raise self._unreachable("sends without end")
            data = self._some_bytes(time.monotonic() + self._timeout)
            self._buffer += data
            read += len(data)
            self._note_buffered()
        return self._resets

    def _note_buffered(self) -> None:
        while (message := self._buffered()) is not None:
            if "event" in message:  # else the answer to a command that timed out
                self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        self._resets += event.get("event") == "RESET"

    def _send(self, data: bytes) -> None:
        self._socket.settimeout(self._timeout)
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._unreachable(f"does not take commands: {error}") from error

    def _receive(self, deadline: float) -> dict[str, Any]:
        while (message := self._buffered()) is None:
            if len(self._buffer) > _MESSAGE_LIMIT:
                raise self._unreachable("sends without end")
            self._buffer += self._some_bytes(deadline)
        return message

    def _buffered(self) -> dict[str, Any] | None:
        # The next complete message: QEMU ends each with a newline, and none contains one.
        if (end := self._buffer.find(b"\n")) < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._unreachable("does not speak QMP") from error
        if not isinstance(message, dict):
            raise self._unreachable("does not speak QMP")
        return message

    def _some_bytes(self, deadline: float) -> bytes:
        try:
            left = deadline - time.monotonic()
            if left <= 0:  # a peer that sends a byte now and then must not delay us longer
                raise TimeoutError
            self._socket.settimeout(left)
            data = self._socket.recv(1 << 16)
        except TimeoutError as error:
            raise self._unreachable(f"gave no answer within {self._timeout:g} s") from error
        except OSError as error:
            raise self._unreachable(f"broke the connection: {error}") from error
        if not data:
            raise self._unreachable("closed the connection")
        return data

    def _unreachable(self, what: str) -> VmUnreachable:
        return VmUnreachable(f"the VM at {self._name} {what}", _HINT)
