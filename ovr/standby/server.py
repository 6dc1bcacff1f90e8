"""The process that stands by: a loop that waits for clients, and forks a child for each.

It ends with the last of the VMs for which it stands by. It has one thread, or it could not fork; so
everything in its loop is short, and a client that says nothing is waited for a second at most.
"""

import gc
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NoReturn

from ovr.credentials import peer_of
from ovr.standby.child import Request, become, die_with
from ovr.standby.messages import StandbyError, close_all, receive, send, version
from ovr.standby.peer import difference, traits

__all__ = ["Server"]

_PATIENCE: Final = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class _Job:
    # A child at work, its pidfd, and the connection to whom it works for.
    pid: int
    ended: int
    client: socket.socket


class Server:
    """Stands by.

    Args:
        listener: the socket at `ovr.standby.messages.address`; the server closes it.
        run: what a child does once it has become the client; it ends the process.
    """

    def __init__(self, listener: socket.socket, run: Callable[[], NoReturn]) -> None:
        self._listener = listener
        self._run = run
        self._traits = traits(os.getpid())
        self._code = _code()
        self._vms: dict[int, int] = {}  # pidfds by pid
        self._jobs: dict[int, _Job] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def keep(self, pid: int) -> None:
        """Stand by as long as the process `pid` lives: a VM's QEMU."""
        if pid not in self._vms:
            with suppress(OSError):  # it has ended already
                ended = os.pidfd_open(pid)
                self._vms[pid] = ended
                self._selector.register(ended, selectors.EVENT_READ, lambda: self.drop(pid))

    def drop(self, pid: int) -> None:
        """Stand by no longer for that VM."""
        ended = self._vms.pop(pid, None)
        if ended is not None:
            self._selector.unregister(ended)
            os.close(ended)

    def serve(self) -> None:
        """Serve until there is no VM left to stand by for, and all children have ended."""
        gc.freeze()  # a collection in a child would touch, and so copy, every object
        while self._vms:
            self._step()
        self._selector.unregister(self._listener)
        self._listener.close()  # whoever wants another may start one
        while self._jobs:
            self._step()

    def _step(self) -> None:
        for key, _ in self._selector.select():
            # One of them may have done away with another.
            if key.fd in self._selector.get_map():
                key.data()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        kept = False
        try:
            client.settimeout(_PATIENCE)
            kept = self._answer(client)
        except StandbyError as error:
            with suppress(OSError):
                send(client, [b"no", str(error).encode()])
        except OSError:  # the client has gone, or says nothing
            pass
        finally:
            if not kept:
                client.close()

    def _answer(self, client: socket.socket) -> bool:
        # Whether the connection is kept: a child works for it.
        pid, uid = peer_of(client)
        if uid != os.geteuid():
            raise StandbyError("it is another user's")
        fields, files = receive(client)
        try:
            if fields[1:2] != [version()]:
                raise StandbyError("it is of another ovr, or of another Python")
            self._check_code()
            if fields[0] == b"restore":
                self._start(client, pid, fields[2:], files)
                return True
            self._order(fields[0], fields[2:])
            send(client, [b"done"])
            return False
        finally:
            close_all(files)

    def _check_code(self) -> None:
        # What is loaded here must be what lies there, or the command does not what its files say.
        if _code() != self._code:
            for pid in [*self._vms]:
                self.drop(pid)
            raise StandbyError("its code has been changed meanwhile; it ends now")

    def _order(self, word: bytes, arguments: Sequence[bytes]) -> None:
        orders = {b"keep": self.keep, b"drop": self.drop}
        try:
            (pid,) = arguments
            orders[word](int(pid))
        except (ValueError, KeyError, OverflowError) as error:
            raise StandbyError("it does not know that order") from error

    def _start(
        self, client: socket.socket, pid: int, fields: Sequence[bytes], files: Sequence[int]
    ) -> None:
        if differs := difference(self._traits, traits(pid)):
            raise StandbyError(f"its {differs} is not this process's")
        request = Request.read(pid, fields, files)
        try:
            send(client, [b"ready"])
            # Until it says so the client may give up, and do the work itself.
            if client.recv(1) != b"\0":
                raise StandbyError("the client has given up")
            server = os.getpid()
            child = os.fork()
            if not child:
                self._work(client, request, server)
        finally:
            os.close(request.directory)
        job = _Job(child, os.pidfd_open(child), client)
        self._jobs[child] = job
        self._selector.register(job.ended, selectors.EVENT_READ, lambda: self._end(job))
        self._selector.register(client, selectors.EVENT_READ, lambda: self._hear(job))

    def _work(self, client: socket.socket, request: Request, server: int) -> NoReturn:
        try:
            die_with(server)
            self._let_go(client)
            become(request)
            self._run()
        except BaseException:
            sys.excepthook(*sys.exc_info())  # as Python does with what nobody catches
        finally:
            os._exit(1)

    def _let_go(self, client: socket.socket) -> None:
        # In the child, which takes the client's numbers: no object may think that it owns one.
        for job in self._jobs.values():
            os.close(job.ended)
            job.client.close()
        close_all([*self._vms.values()])
        self._selector.close()
        self._listener.close()
        client.close()

    def _hear(self, job: _Job) -> None:
        # Each byte is a signal that the client got; there is none when it has gone.
        try:
            numbers = job.client.recv(64)
        except OSError:
            numbers = b""
        if not numbers:
            self._selector.unregister(job.client)
        for number in numbers or bytes([signal.SIGKILL]):
            with suppress(OSError):
                os.kill(job.pid, number)

    def _end(self, job: _Job) -> None:
        self._selector.unregister(job.ended)
        os.close(job.ended)
        del self._jobs[job.pid]
        _, status = os.waitpid(job.pid, 0)
        with suppress(KeyError):  # it had gone before
            self._selector.unregister(job.client)
        with suppress(OSError):
            send(job.client, [b"ended", b"%d" % os.waitstatus_to_exitcode(status)])
        job.client.close()


def _code() -> Mapping[str, tuple[int, int]]:
    # When the files of all that is loaded were changed; those of `ovr`, Python's and others'.
    found = {}
    for module in [*sys.modules.values()]:
        path = getattr(module, "__file__", None)
        with suppress(OSError):
            if path:
                status = os.stat(path)  # noqa: PTH116 - four hundred of them, for each client
                found[path] = status.st_ino, status.st_mtime_ns
    return found
