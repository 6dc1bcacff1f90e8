"""The process of a command: settings that must be there before anything large is loaded."""

import gc
import os
from contextlib import suppress
from typing import Final

__all__ = ["hurry", "set_up"]

_GARBAGE: Final = 50_000
_FIRST: Final = -20


def set_up() -> None:
    """Have numpy start no threads, and the garbage collector run seldom: commands are short.

    numpy's BLAS starts a thread for each CPU, which look for work for a while; none of ours is.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(_GARBAGE)


def hurry() -> None:
    """Give this process the best nice value, where it may have it and the user has chosen none.

    In the moment of a restore the vCPUs of a loaded VM want every CPU of the host.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) == 0:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, _FIRST)
