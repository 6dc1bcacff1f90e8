"""Messages of the inside image set while they are being changed."""

from typing import TypeVar

from ovr.images.imageset import ImageSet
from ovr.images.rewrite import InsideImages
from ovr.images.wire import Message, copy_of

__all__ = ["Draft"]

M = TypeVar("M", bound=Message)


class Draft:
    """Copies of messages, made when first asked for, so that many may change the same one.

    Args:
        images: where they come from.
    """

    def __init__(self, images: ImageSet) -> None:
        self._images = images
        self._original: dict[str, tuple[Message, ...]] = {}
        self._copies: dict[str, list[Message]] = {}

    def message(self, image: str, index: int, kind: type[M]) -> M:
        """Return the copy of entry `index` of an image, to be changed in place."""
        if image not in self._copies:
            self._original[image] = self._images.entries(image, kind)
            self._copies[image] = [copy_of(entry) for entry in self._original[image]]
        found = self._copies[image][index]
        assert isinstance(found, kind)
        return found

    def apply_to(self, inside: InsideImages) -> None:
        """Hand in what has changed; what has not is passed on byte for byte."""
        for name, entries in self._copies.items():
            if tuple(entries) != self._original[name]:
                inside.replace(name, *entries)
