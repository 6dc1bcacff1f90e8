"""Images that the guest's CRIU has written, received from the agent. The guest is not trusted."""

import os
import re
from pathlib import Path
from typing import Final

from ovr.attempt.sink import Sink
from ovr.dump.output import INVENTORY, NewImages, writable
from ovr.errors import ImagesDamaged
from ovr.guest.dump_protocol import PAGES

__all__ = ["Fetched", "Received"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,195}\.img")  # FD_ENTRY in criu/image-desc.c
_MAX_FILES: Final = 1 << 20
_SUSPECT: Final = "is this agent the guest's own, and unchanged?"


class Received:
    """Writes images as they arrive.

    Args:
        images: gets them.
        also: name of a file that may come besides images.
        most: bytes that they may have in all.

    Attributes:
        names: names of the complete images, in the order in which they came.
    """

    def __init__(self, images: NewImages, most: int, *, also: str | None = None) -> None:
        self.names: list[str] = []
        self._also = also
        self._left = self._most = most
        self._images = images
        self._done: set[str] = set()
        self._seen: set[str] = set()

    def save(self, name: str, data: bytes) -> None:
        """Append a piece to the image `name`; an empty one ends it.

        Raises:
            ImagesDamaged: it is no name of an image, or the image has ended.
            UsageError: the file cannot be written.
        """
        known = _NAME.fullmatch(name) or name == self._also
        if not known or name in self._done or name.startswith(PAGES):
            raise ImagesDamaged(f"the agent sent an image with the name {name[:80]!r}", _SUSPECT)
        self._seen.add(name)
        if len(self._seen) > _MAX_FILES:
            raise ImagesDamaged(f"the agent sent more than {_MAX_FILES} images", _SUSPECT)
        self._left -= len(data)
        if self._left < 0:
            raise ImagesDamaged(f"the agent sent more than {self._most} bytes of images", _SUSPECT)
        self._images.append(name, data)
        if not data:
            self._done.add(name)
            self.names.append(name)

    def check_complete(self) -> None:
        """Check that no image is missing its end, and that there is an inventory.

        Raises:
            ImagesDamaged: the images are not complete.
        """
        if self._seen != self._done or INVENTORY not in self._done:
            raise ImagesDamaged("the agent has not sent all images", _SUSPECT)


class Fetched:
    """Writes one pages image as it arrives.

    Args:
        sink: gets it.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._size = 0

    def save(self, name: str, data: bytes) -> None:
        """Append a piece.

        Raises:
            ImagesDamaged: it is a piece of another image, or too large.
            UsageError: the file cannot be written.
        """
        if name != self._sink.name or self._size + len(data) > self._sink.size:
            raise ImagesDamaged(f"the agent sent no such {self._sink.name}", _SUSPECT)
        with writable(Path(self._sink.name)):
            while data:
                done = os.pwrite(self._sink.fd, data, self._size)
                data, self._size = data[done:], self._size + done

    def check_complete(self) -> None:
        """Check that nothing is missing.

        Raises:
            ImagesDamaged: the image is too short.
        """
        if self._size != self._sink.size:
            raise ImagesDamaged(f"{self._sink.name} is too short", _SUSPECT)
