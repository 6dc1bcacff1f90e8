"""Open files by their descriptors: ``struct files_struct`` and its ``struct fdtable``.

Source: fs/file.c, include/linux/fdtable.h.
"""

from typing import Any, Final

from ovr.kernel.types.view import Struct
from ovr.memory.addresses import Gva

__all__ = ["close_on_exec", "files_lookup_fd", "set_close_on_exec"]

_BITS: Final = 64  # BITS_PER_LONG
_NR_OPEN_MAX: Final = 1 << 30  # no sysctl allows more (sysctl_nr_open_max)


def files_lookup_fd(files: Struct, fd: int) -> Any:
    """Return the ``struct file`` of a descriptor, or NULL (``files_lookup_fd_raw()``)."""
    fdt = files.fdt
    if not 0 <= fd < min(fdt.max_fds, _NR_OPEN_MAX):
        return files.types_.pointer("struct file", files.space_, Gva(0))
    return fdt.fd[fd]


def close_on_exec(files: Struct, fd: int) -> bool:
    """Tell whether exec closes a descriptor that is open (``close_on_exec()``)."""
    return bool(files.fdt.close_on_exec[fd // _BITS] >> fd % _BITS & 1)


def set_close_on_exec(files: Struct, fd: int, value: bool) -> None:
    """Set or clear close-on-exec of an open descriptor (``__set_close_on_exec()``).

    Reads, changes and writes a word of the bitmap: nothing else may change the table meanwhile.
    """
    bitmap = files.fdt.close_on_exec
    others = bitmap[fd // _BITS] & ~(1 << fd % _BITS)
    bitmap[fd // _BITS] = others | value << fd % _BITS
