"""Classify errors of reading images: permission, storage or damage."""

import errno
from collections.abc import Mapping
from typing import Final

from ovr.errors import ImagesDamaged, ImagesForbidden, ImagesUnreachable, OvrError

__all__ = ["unreadable"]

_CURES: Final[Mapping[int, tuple[type[OvrError], str]]] = {
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM),
        (
            ImagesForbidden,
            "criu writes images for root alone: run ovr as root, or give its user the right to read"
            " them; root has none on NFS with root_squash",
        ),
    ),
    errno.ESTALE: (ImagesUnreachable, "the file server no longer has it: mount it again"),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE, errno.ENOMEM),
        (ImagesUnreachable, "the host has run out of them: raise the limit, or free some"),
    ),
}
_FILE_SYSTEM: Final = "look at its disk or file server, and at the host's kernel log"


def unreadable(
    label: str, error: OSError, *, damaged: tuple[int, ...] = (), cure: str = ""
) -> OvrError:
    """Return the error for an image that cannot be read.

    Args:
        label: the image, for the message.
        error: the error of the system call.
        damaged: errno values that mean a damaged image.
        cure: the hint for a damaged image.

    Returns:
        `ImagesForbidden` without permission, `ImagesDamaged` for `damaged`, else
        `ImagesUnreachable`.
    """
    message = f"{label}: cannot be read: {error.strerror}"
    if error.errno in damaged:
        return ImagesDamaged(message, cure)
    kind, hint = _CURES.get(error.errno or 0, (ImagesUnreachable, _FILE_SYSTEM))
    return kind(message, hint)
