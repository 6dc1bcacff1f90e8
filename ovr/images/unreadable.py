"""Why images cannot be read: who may not, what fails below them, or what is wrong with them."""

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
        (ImagesUnreachable, "the host is short of it: raise the limit, or free some"),
    ),
}
_FILE_SYSTEM: Final = "look at its disk or file server, and at the host's kernel log"


def unreadable(
    label: str, error: OSError, *, damaged: tuple[int, ...] = (), cure: str = ""
) -> OvrError:
    """Return the error for an image that the host does not let us read.

    Args:
        label: the image, for the message.
        error: what the system call failed with.
        damaged: errno values that say that the image itself is wrong.
        cure: what to do in these cases.

    Returns:
        `ImagesForbidden` without permission, `ImagesDamaged` for `damaged`, else
        `ImagesUnreachable`.
    """
    message = f"{label}: cannot be read: {error.strerror}"
    if error.errno in damaged:
        return ImagesDamaged(message, cure)
    kind, hint = _CURES.get(error.errno or 0, (ImagesUnreachable, _FILE_SYSTEM))
    return kind(message, hint)
