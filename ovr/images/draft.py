"""Edit messages of the inside image set."""

from typing import TypeVar

from ovr.images.imageset import ImageSet
from ovr.images.rewrite import InsideImages
from ovr.images.wire import Message, copy_of

__all__ = ["Draft"]

M = TypeVar("M", bound=Message)


class Draft:
    """Editable copies of messages, made on first use and shared by all callers.

    Args:
        images: the original images.
    """

    def __init__(self, images: ImageSet) -> None:
        self._images = images
        self._original: dict[str, tuple[Message, ...]] = {}
        self._copies: dict[str, list[Message]] = {}

    def message(self, image: str, index: int, kind: type[M]) -> M:
        """Return the editable copy of entry `index` of an image."""
        if image not in self._copies:
            self._original[image] = self._images.entries(image, kind)
            self._copies[image] = [copy_of(entry) for entry in self._original[image]]
        found = self._copies[image][index]
        assert isinstance(found, kind)
        return found

    def apply_to(self, inside: InsideImages) -> None:
        """Replace the images that have changed; the others stay as they are, byte for byte."""
        for name, entries in self._copies.items():
            if tuple(entries) != self._original[name]:
                inside.replace(name, *entries)
