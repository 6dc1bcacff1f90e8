"""Hints for files that cannot be made or written."""

import errno
from typing import Final

from ovr.host.trust import UntrustedPath

__all__ = ["cure_of"]

_CLOSED: Final = (errno.EROFS, errno.EACCES, errno.EPERM)
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cure_of(error: OSError, elsewhere: str) -> str:
    """Return the hint for a file that could not be made or written.

    Args:
        error: the error of the system call.
        elsewhere: an instruction that puts the file somewhere else.
    """
    if isinstance(error, UntrustedPath):
        return error.hint
    if error.errno in _FULL:
        return f"free space there, or {elsewhere}"
    if error.errno == errno.ENOENT:
        return f"create its directory, or {elsewhere}"
    if error.errno in _CLOSED:
        return f"nothing can be written there: {elsewhere}"
    return elsewhere
