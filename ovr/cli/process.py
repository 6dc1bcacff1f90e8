"""The process of a command: what must be set before anything large is loaded, and how it ends."""

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
_M_MMAP_THRESHOLD, _LARGE = -3, 32 << 20  # the most that glibc takes


def set_up() -> None:
    """Have numpy start no threads, and the garbage collector run seldom: commands are short.

    numpy's BLAS starts a thread for each CPU, which look for work for a while; none of ours is.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(_GARBAGE)


def keep_memory() -> None:
    """Have malloc keep what is freed: each hold of a restore has arrays of the same sizes.

    What is given back to the kernel has to be faulted in again at once.
    """
    import ctypes  # noqa: PLC0415 - numpy loads it, too; other commands may have neither

    with suppress(AttributeError):  # a C library without it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def hurry() -> None:
    """Give this process the best nice value, where it may have it and the user has chosen none.

    In the moment of a restore the vCPUs of a loaded VM want every CPU of the host.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) == 0:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, _FIRST)


def leave(code: int) -> NoReturn:
    """End this process, all said and done.

    Python would take every module and object apart first: a tenth of a second, for nobody.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
