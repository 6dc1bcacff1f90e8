"""Turning a forked child into the command whose work it does."""

import ctypes
import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fcntl import F_DUPFD_CLOEXEC, fcntl
from typing import Final, Self, TextIO

from ovr.standby.client import notes
from ovr.standby.messages import StandbyError
from ovr.standby.peer import status_of

__all__ = ["Request", "become", "die_with"]

_PR_SET_PDEATHSIG: Final = 1
_STREAMS: Final = (("stdin", "rb"), ("stdout", "wb"), ("stderr", "wb"))
_UNCHANGEABLE: Final = {signal.SIGKILL, signal.SIGSTOP}


@dataclass(frozen=True, slots=True)
class Request:
    """A command to run, exactly as the client would have run it.

    Attributes:
        arguments: of the command.
        numbers: the client's file descriptors.
        files: their duplicates in this process.
        streams: encoding and error handler of the three standard streams, as ``utf-8:strict``;
            empty for one that is closed.
        environment: of the client.
        directory: a file descriptor of its current directory.
        umask: its file mode creation mask.
        ignored: the signals that it ignores, a bit for each, from 1 on.
        blocked: the signals that it blocks, likewise.
    """

    arguments: Sequence[str]
    numbers: Sequence[int]
    files: Sequence[int]
    streams: Sequence[str]
    environment: Mapping[bytes, bytes]
    directory: int
    umask: int
    ignored: int
    blocked: int

    @classmethod
    def read(cls, pid: int, fields: Sequence[bytes], files: Sequence[int]) -> Self:
        """Read the request of the client `pid`, and its /proc.

        The caller closes `files` and `directory`.

        Raises:
            StandbyError: the request is invalid.
            OSError: the client has ended, or its /proc may not be read.
        """
        try:
            numbers = [int(number) for number in fields[0].split(b",") if number]
            streams = [field.decode("ascii") for field in fields[1:4]]
            count = int(fields[4])
            arguments = [os.fsdecode(field) for field in fields[5 : 5 + count]]
            environment = _environment(fields[5 + count :])
        except (IndexError, ValueError) as error:
            raise StandbyError("that is no request") from error
        if len(numbers) != len(files) or min((*numbers, count)) < 0:
            raise StandbyError("that is no request")
        status = status_of(pid)
        return cls(
            arguments, numbers, files, streams,
            environment=environment,
            umask=int(status["Umask"], 8),
            ignored=int(status["SigIgn"], 16),
            blocked=int(status["SigBlk"], 16),
            directory=os.open(f"/proc/{pid}/cwd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC),
        )  # fmt: skip


def _environment(fields: Sequence[bytes]) -> Mapping[bytes, bytes]:
    entries = (field.partition(b"=") for field in fields)
    return {name: value for name, _, value in entries if name}


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, whose pid that is, dies (prctl(2))."""
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) or os.getppid() != parent:
        os._exit(1)


def become(request: Request) -> None:
    """Take over the client's state. No file descriptors but those of the request may be in use.

    Raises:
        OSError: the client's directory cannot be entered.
    """
    os.fchdir(request.directory)
    os.close(request.directory)
    os.umask(request.umask)
    _take_signals(request.ignored, request.blocked)
    os.environb.clear()
    os.environb.update(request.environment)
    _place(request.files, request.numbers)
    for fd, ((name, mode), text) in enumerate(zip(_STREAMS, request.streams, strict=True)):
        stream = _stream(fd, mode, text) if text and fd in request.numbers else None
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv[1:] = request.arguments
    notes.append("done by the standby process")


def _take_signals(ignored: int, blocked: int) -> None:
    # Signals that Python ignores are ignored by the client, too.
    numbers = signal.valid_signals() - _UNCHANGEABLE
    for number in numbers:
        if ignored >> number - 1 & 1:
            signal.signal(number, signal.SIG_IGN)
        elif number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        else:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, {n for n in numbers if blocked >> n - 1 & 1})


def _place(files: Sequence[int], numbers: Sequence[int]) -> None:
    # Through numbers above all of these, since a wanted number may be in use for another one.
    above = max((*files, *numbers, 2)) + 1
    high = [fcntl(fd, F_DUPFD_CLOEXEC, above) for fd in files]
    for fd in {*files, 0, 1, 2}:
        os.close(fd)
    for fd, number in zip(high, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)


def _stream(fd: int, mode: str, text: str) -> TextIO:
    encoding, _, errors = text.partition(":")
    buffered = open(fd, mode, closefd=False)  # noqa: SIM115 - as long as the process lives
    at_once = fd == 2 or buffered.isatty()  # as Python does it
    return io.TextIOWrapper(buffered, encoding, errors, line_buffering=at_once)
