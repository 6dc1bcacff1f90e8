"""``python -m ovr.cli.standby QEMU_PID``: the standby process, started by ``ovr warm``.

It goes into the background when it accepts requests, with /dev/null as its standard streams.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Final, NoReturn

from ovr.cli import main, make_parser, process
from ovr.standby.place import Place
from ovr.standby.server import Server

__all__ = ["serve"]

# Modules that a restore loads late, if at all.
_LATER: Final = ("importlib.metadata", "psutil", "xml.etree.ElementTree")


def serve(qemu_pid: int) -> None:
    """Serve requests until this VM, and all VMs added later, have ended.

    Raises:
        OSError: another standby process exists.
    """
    process.set_up()
    make_parser("restore")
    for name in _LATER:
        import_module(name)
    with Place() as place:
        with _into_background():
            place.listen()
            server = Server(place, _run)
        server.keep(qemu_pid)
        server.serve()


def _run() -> NoReturn:
    try:
        code = main()
    except SystemExit as ended:  # wrong usage, a signal
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    process.leave(code)


@contextmanager
def _into_background() -> Iterator[None]:
    # The parent exits at the end of the ``with``.
    ready, tell = os.pipe()
    if os.fork():
        os.close(tell)
        os._exit(0 if os.read(ready, 1) else 1)
    os.close(ready)
    os.setsid()
    os.chdir("/")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nowhere, fd)
    os.close(nowhere)
    yield
    os.write(tell, b".")
    os.close(tell)


if __name__ == "__main__":
    try:
        serve(int(sys.argv[1]))
    except OSError as error:
        sys.exit(f"it cannot stand by: {error.strerror or error}")
