"""The standby process: a loop that waits for clients, and forks a child for each.

It ends with the last of the VMs for which it stands by. It has a single thread, so that it can
fork; so each step of its loop is short, and none waits for a client (`visit`).
"""

import gc
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NoReturn

from ovr.standby.child import Request, become, die_with
from ovr.standby.messages import Message, StandbyError, close_all, send, version
from ovr.standby.peer import circumstances, rights
from ovr.standby.place import Place
from ovr.standby.visit import Talk, Visit, welcome

__all__ = ["Server"]

_ENDING: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_VISITS: Final = 64
"""The most clients that may be waited for at a time; a further one replaces the first of them."""


@dataclass(frozen=True, slots=True)
class _Job:
    # A child at work, its pidfd, and the connection to its client.
    pid: int
    ended: int
    client: socket.socket


class Server:
    """The server of the standby process.

    Args:
        place: its socket; the server removes it.
        run: called in a child that has taken over the client's state; it ends the process.
    """

    def __init__(self, place: Place, run: Callable[[], NoReturn]) -> None:
        self._place = place
        self._run = run
        self._rights = rights(os.getpid())
        self._circumstances = circumstances(os.getpid())
        self._code = _code()
        self._vms: dict[int, int] = {}  # pidfds by pid
        self._jobs: dict[int, _Job] = {}
        self._visits: dict[int, Visit] = {}  # by descriptor, the oldest first
        self._selector = selectors.DefaultSelector()
        self._selector.register(place.socket, selectors.EVENT_READ, self._accept)

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
        for number in _ENDING:
            signal.signal(number, _end)
        gc.freeze()  # a collection in a child would touch, and so copy, every object
        while self._vms:
            self._step()
        for visit in [*self._visits.values()]:
            self._end_visit(visit)
        self._selector.unregister(self._place.socket)
        self._place.remove()  # so that another process can stand by
        while self._jobs:
            self._step()

    def _step(self) -> None:
        deadline = min((visit.deadline for visit in self._visits.values()), default=None)
        timeout = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        for key, _ in self._selector.select(timeout):
            # An earlier event may have closed it, and opened another with the same number.
            if self._selector.get_map().get(key.fd) is key:
                key.data()
        now = time.monotonic()
        for visit in [*self._visits.values()]:
            if visit.deadline <= now:
                self._end_visit(visit)

    def _accept(self) -> None:
        try:
            client, _ = self._place.socket.accept()
        except OSError:  # it has ended
            return
        try:
            visit = Visit(client, self._talk)
        except StandbyError as error:
            with client, suppress(OSError):
                send(client, [b"no", str(error).encode()])
            return
        except OSError:
            client.close()
            return
        if len(self._visits) >= _VISITS:
            self._end_visit(next(iter(self._visits.values())))
        self._visits[client.fileno()] = visit
        self._selector.register(
            client, selectors.EVENT_READ, lambda: self._go_on(visit, visit.receive)
        )
        self._go_on(visit, visit.begin)

    def _go_on(self, visit: Visit, step: Callable[[], bool | None]) -> None:
        ended = True
        try:
            ended = bool(step())
        except StandbyError as error:
            visit.refuse(error)
        except OSError:  # the client has ended, or does not read
            pass
        if ended:
            self._end_visit(visit)

    def _end_visit(self, visit: Visit) -> None:
        fd = next(fd for fd, one in self._visits.items() if one is visit)
        del self._visits[fd]
        if visit.connection is not None:
            self._selector.unregister(fd)
        visit.end()

    def _talk(self, visit: Visit) -> Talk:
        yield from welcome(visit, self._rights)
        message = yield
        try:
            if message.fields[1:2] != [version()]:
                raise StandbyError("it is of another ovr, or of another Python")
            self._check_code()
            if message.fields[0] == b"restore":
                yield from self._restore(visit, message)
            else:
                self._order(message.fields[0], message.fields[2:])
                visit.say(b"done")
        finally:
            close_all(message.files)

    def _check_code(self) -> None:
        # The loaded code must be that of the files, as in a command that loads it now.
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

    def _restore(self, visit: Visit, message: Message) -> Talk:
        visit.peer.require_same(self._circumstances, circumstances)
        try:
            request = Request.read(visit.peer.pid, message.fields[2:], message.files)
        except OSError as error:
            raise StandbyError(
                f"/proc/{visit.peer.pid} cannot be read: {error.strerror}"
            ) from error
        try:
            visit.peer.require_alive()
            visit.say(b"ready")
            # Until its 'go', the client may give up and do the work itself.
            if (yield).fields != [b"go"]:
                raise StandbyError("the client has given up")
            self._start(visit, request)
        finally:
            os.close(request.directory)

    def _start(self, visit: Visit, request: Request) -> None:
        server = os.getpid()
        child = os.fork()
        if not child:
            self._work(visit, request, server)
        job = _Job(child, os.pidfd_open(child), visit.keep())
        self._jobs[child] = job
        self._selector.register(job.ended, selectors.EVENT_READ, lambda: self._end(job))
        self._selector.modify(job.client, selectors.EVENT_READ, lambda: self._forward(job))

    def _work(self, visit: Visit, request: Request, server: int) -> NoReturn:
        try:
            die_with(server)
            self._let_go(visit)
            become(request)
            self._run()
        except BaseException:
            sys.excepthook(*sys.exc_info())  # as Python does with uncaught exceptions
        finally:
            os._exit(1)

    def _let_go(self, own: Visit) -> None:
        # In the child, whose descriptors become the client's: no object may close them later.
        for job in self._jobs.values():
            os.close(job.ended)
            job.client.close()
        close_all([*self._vms.values()])
        self._selector.close()
        self._place.leave()
        for visit in self._visits.values():
            if visit is not own:
                visit.end()
        own.release()

    def _forward(self, job: _Job) -> None:
        # Each byte is a signal that the client received; end of file means that it has ended.
        try:
            numbers = job.client.recv(64)
        except BlockingIOError:
            return
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
        with suppress(KeyError):  # it had ended before
            self._selector.unregister(job.client)
        with suppress(OSError):
            send(job.client, [b"ended", b"%d" % os.waitstatus_to_exitcode(status)])
        job.client.close()


def _end(number: int, _: object) -> NoReturn:
    # Through every ``with``, so that no socket stays. Children die with their parent.
    sys.exit(128 + number)


def _code() -> Mapping[str, tuple[int, int]]:
    # Modification times of the files of all loaded modules: those of `ovr`, Python and others.
    found = {}
    for module in [*sys.modules.values()]:
        path = getattr(module, "__file__", None)
        with suppress(OSError):
            if path:
                status = os.stat(path)  # noqa: PTH116 - four hundred of them, for each client
                found[path] = status.st_ino, status.st_mtime_ns
    return found
