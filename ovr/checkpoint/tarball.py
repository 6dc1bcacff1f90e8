"""Access the members of a container's checkpoint archive by name."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ovr.checkpoint.unpack import open_tar
from ovr.errors import ImagesDamaged, ImagesUnsupported
from ovr.host.closing import Closing
from ovr.images.directory import read_exactly
from ovr.images.framing import DUMP_AGAIN

__all__ = ["Tarball"]

_MAX_JSON: Final = 4 << 20  # bytes; podman's config.dump has some 20 KiB
_CHUNK: Final = 1 << 20


class Tarball(Closing):
    """An open tar, read-only, unpacked if it was packed. Use as a context manager, or `close` it.

    Args:
        path: the file.

    Attributes:
        path: the file.
        fd: descriptor of the uncompressed tar.
        members: its members by name.

    Raises:
        OvrError: as `open_tar`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd, self.members = open_tar(path)

    def close(self) -> None:
        """Close the file, and delete the unpacked copy."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def has_below(self, prefix: str) -> bool:
        """Return whether it has members whose names begin with `prefix`."""
        return any(name.startswith(prefix) for name in self.members)

    def read(self, name: str, limit: int = _MAX_JSON) -> bytes:
        """Return the whole content of the member `name`.

        Raises:
            ImagesDamaged: it is missing, or not a file.
            ImagesUnsupported: it is larger than `limit` bytes.
        """
        member = self.members.get(name)
        if member is None or not member.is_file:
            raise ImagesDamaged(f"{self.path}: does not contain a file {name}", DUMP_AGAIN)
        if member.size > limit:
            raise ImagesUnsupported(f"{self.path}: {name} has {member.size} bytes", DUMP_AGAIN)
        return read_exactly(self.fd, member.offset_data, member.size, name)

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in the member `name`.

        Raises:
            ImagesDamaged: it is missing, or not a JSON object.
            ImagesUnsupported: it is too large.
        """
        try:
            found = json.loads(self.read(name))
        except RecursionError as error:
            raise ImagesDamaged(f"{self.path}: {name} is nested too deeply", DUMP_AGAIN) from error
        except ValueError as error:
            raise ImagesDamaged(f"{self.path}: {name} is not JSON: {error}", DUMP_AGAIN) from error
        if not isinstance(found, dict):
            raise ImagesDamaged(f"{self.path}: {name} is not a JSON object", DUMP_AGAIN)
        return found

    def copy(self, name: str) -> Iterator[bytes]:
        """Yield the member `name` with its headers, byte for byte.

        Raises:
            ImagesDamaged: the file became shorter.
        """
        member = self.members[name]
        for at in range(member.offset, member.end, _CHUNK):
            yield read_exactly(self.fd, at, min(_CHUNK, member.end - at), str(self.path))
