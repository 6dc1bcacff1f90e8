"""Set up the process of a command before large modules are loaded, and end it."""

import gc
import logging
import os
import sys
from contextlib import suppress
from typing import Final, NoReturn

__all__ = ["hurry", "keep_memory", "leave", "set_up"]

_GARBAGE: Final = 200_000
_FIRST: Final = -20
_M_TRIM_THRESHOLD, _KEPT = -1, 256 << 20
_M_MMAP_THRESHOLD, _LARGE = -3, 32 << 20  # glibc's maximum


def set_up() -> None:
    """Prevent threads of numpy, and make garbage collections rare, because commands are short.

    numpy's BLAS would start a thread for each CPU, which polls for work; ovr does not use BLAS.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(_GARBAGE)


def keep_memory() -> None:
    """Make malloc keep freed memory, because each hold of a restore has arrays of the same sizes.

    Memory returned to the kernel would have to be faulted in again in the next hold.
    """
    import ctypes  # noqa: PLC0415 - numpy loads it too; other commands may need neither

    with suppress(AttributeError):  # a C library without it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def hurry() -> None:
    """Set the best nice value, if permitted and the user has not chosen one.

    During a restore the vCPUs of a loaded VM compete for every CPU of the host.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) == 0:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, _FIRST)


def leave(code: int) -> NoReturn:
    """Flush all output and end this process at once.

    A regular exit of Python destroys every module and object first, which takes a tenth of a
    second.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
