"""Build the inside image set: some images changed, the others copied byte for byte."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ovr.errors import ImagesUnsupported
from ovr.images.directory import ImageFile, read_exactly
from ovr.images.framing import encode, image_bytes, is_raw
from ovr.images.imageset import ImageSet
from ovr.images.pagemap import PAGEMAP_DTYPE, PE_LAZY, PE_PRESENT, Pagemap, encode_pagemap
from ovr.images.task import Memory
from ovr.images.wire import Message
from ovr.memory.extents import Extents, cut_to, ends_of, total

__all__ = ["InsideImages", "Slices", "image_chunks", "image_size"]

_CHUNK: Final = 1 << 20
_SMALL: Final = 1 << 16  # larger unchanged files are not read into memory


@dataclass(frozen=True)
class Slices:
    """An image made of slices of the user's images, which are read when it is sent.

    Attributes:
        slices: file, offset and size in bytes of each, in order.
    """

    slices: tuple[tuple[ImageFile, int, int], ...]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return sum(size for _, _, size in self.slices)

    def chunks(self, limit: int = _CHUNK) -> Iterator[bytes]:
        """Yield the content in chunks of at most `limit` bytes.

        Raises:
            ImagesDamaged: a file became shorter.
        """
        file, fd = None, -1
        try:
            for wanted, offset, size in self.slices:
                if wanted is not file:
                    _close(fd)
                    file, fd = wanted, -1
                    fd = wanted.open()
                start = wanted.base + offset
                for at in range(start, start + size, limit):
                    yield read_exactly(fd, at, min(limit, start + size - at), wanted.label)
        finally:
            _close(fd)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def image_size(image: bytes | Slices) -> int:
    """Return the size of an image of the inside image set, in bytes."""
    return len(image) if isinstance(image, bytes) else image.size


def image_chunks(image: bytes | Slices) -> Iterator[bytes]:
    """Yield the content of an image of the inside image set in chunks."""
    return iter((image,)) if isinstance(image, bytes) else image.chunks()


class InsideImages:
    """Build the image set that CRIU restores inside the guest.

    Starts as the given image set; `replace` and `keep_pages` change it. The result is
    deterministic. A pages image is always complete, because CRIU loops for ever on a short one, and
    a task's pagemap keeps at least one entry, because CRIU crashes on an empty one.
    """

    def __init__(self, images: ImageSet) -> None:
        self._images = images
        self._changed: dict[str, bytes | Slices] = {}

    def replace(self, name: str, *entries: Message) -> None:
        """Replace the content of the image `name` by these entries.

        Only for images without raw bytes between the entries, and not for pagemaps.

        Raises:
            ValueError: `name` is another kind of image.
        """
        if is_raw(name) or name.startswith("pagemap-"):
            raise ValueError(f"{name} contains more than messages")
        self._changed[name] = image_bytes(name, map(encode, entries))

    def keep_pages(self, memory: Memory, kept: Extents, had_pages: Sequence[int] = ()) -> None:
        """Keep only some pages of a task or of shared memory.

        Kept pages of parent images move into the new pages image.

        Args:
            memory: the task's memory or the shared memory.
            kept: ascending runs of pages, all of them in ``memory.entries``; only `gva` and `size`
                are used.
            had_pages: addresses at which the pagemap gets an empty entry. CRIU looks at the
                positions of entries (``premap_priv_vmas`` of criu/mem.c) to decide whether it maps
                an area writable at first, and the kernel's accounting (VM_ACCOUNT) follows from it.

        Raises:
            ValueError: pages that are not present, or no pages of a task.
        """
        runs = cut_to(memory.entries, kept["gva"], ends_of(kept))
        if total(runs) != total(kept):
            raise ValueError(f"pages to keep are not in {memory.name}, or listed twice")
        if not len(runs) and not memory.name.startswith("pagemap-shmem-"):
            raise ValueError(f"no pages kept in {memory.name}: CRIU would crash")
        runs["flags"] = runs["flags"] & PE_LAZY | PE_PRESENT
        if had_pages:
            runs = np.sort(np.concatenate([runs, _marks(had_pages)]), order="gva")
        pagemap = Pagemap(memory.pages_id, runs, memory.compat)
        self._changed[memory.name] = encode_pagemap(pagemap, memory.name)
        self._changed[memory.pages_name] = _pages(memory, runs[runs["size"] > 0])

    def build(self) -> dict[str, bytes | Slices]:
        """Return the inside image set, sorted by file name. Pass the values to `image_chunks`.

        Raises:
            ImagesUnsupported: a task without any pages.
        """
        for task in self._images.tasks:
            if task.memory is not None and not len(task.memory.entries):
                raise ImagesUnsupported(
                    f"{task.memory.name}: no pages at all, which CRIU cannot restore",
                    "dump again: every process has at least its vDSO",
                )
        self._flatten()
        names = {*self._images.names, *self._changed} - self._stale()
        return {name: self._changed.get(name) or self._original(name) for name in sorted(names)}

    def _flatten(self) -> None:
        """Copy pages of parent images into their children: the guest gets no parent images."""
        for memory in self._images.memories:
            if memory.name not in self._changed and memory.entries["level"].any():
                self.keep_pages(memory, memory.entries)

    def _stale(self) -> set[str]:
        """Return unreferenced memory images, left by an earlier dump into the same directory."""
        used = {
            name for memory in self._images.memories for name in (memory.name, memory.pages_name)
        }
        return {n for n in self._images.names if n.startswith(("pagemap-", "pages-"))} - used

    def _original(self, name: str) -> bytes | Slices:
        file = self._images.file(name)
        if file.size <= _SMALL:
            return self._images.read(name)
        return Slices(((file, 0, file.size),))


def _pages(memory: Memory, runs: Extents) -> Slices:
    """Return the pages of `runs`, in order, with adjacent slices of the same file joined."""
    level, offset = runs["level"], runs["offset"]
    size = runs["size"].astype(np.int64)
    joined = (level[1:] == level[:-1]) & (offset[1:] == offset[:-1] + size[:-1])
    first = np.flatnonzero(np.append(True, ~joined)[: len(runs)])
    sizes = np.add.reduceat(size, first) if len(first) else size
    slices = zip(level[first].tolist(), offset[first].tolist(), sizes.tolist(), strict=True)
    return Slices(tuple((_file(memory, lv), at, length) for lv, at, length in slices))


def _marks(addresses: Sequence[int]) -> Extents:
    # Two entries for each address. For CRIU the first ends at its address, before the area that
    # starts there; but CRIU 3.17 also looks for an entry at that address for the area that ends
    # there.
    marks = np.zeros(2 * len(addresses), PAGEMAP_DTYPE)
    marks["gva"][::2] = addresses
    marks["gva"][1::2] = marks["gva"][::2] + np.uint64(1)
    marks["flags"] = PE_PRESENT
    return marks


def _file(memory: Memory, level: int) -> ImageFile:
    file = memory.files[level]
    assert file is not None  # resolve() gave the level because the file is used
    return file
