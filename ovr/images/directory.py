"""Read a directory of untrusted images.

Every file is opened relative to one directory descriptor, without following symbolic links, and
only if it is a regular file, so that no file outside the directory can be reached. The only link
followed is CRIU's ``parent``, and only within the directory that contains the image directory.
"""

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from ovr.errors import ImagesDamaged, ImagesUnsupported, OvrError, UsageError
from ovr.host.closing import Closing
from ovr.images.framing import DUMP_AGAIN
from ovr.images.packed import HEAD_SIZE, packing
from ovr.images.unreadable import unreadable

__all__ = ["PARENT", "ImageDirectory", "ImageFile"]

_MAX_READ: Final = 64 << 20  # an mm image with a million areas; protobuf objects need much more
_MAX_FILES: Final = 1 << 20
PARENT: Final = "parent"
"""Name of the link to the dump that this one builds on: CRIU's CR_PARENT_LINK."""


class ImageDirectory(Closing):
    """An open directory of image files.

    Attributes:
        label: its name in messages: empty, or ``parent/`` once for each level.
        path: its path.
        sizes: size in bytes of each regular file present when the directory was opened.
        others: names that are neither regular files nor directories.
        bases: offset in bytes at which the content of a name begins in its file, if not 0.
    """

    def __init__(self, path: Path, label: str = "") -> None:
        self.label = label
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError as error:
            raise _not_a_directory(path) from error
        except (FileNotFoundError, ValueError) as error:
            raise UsageError(
                f"{path}: no such directory of images",
                "give the directory that `criu dump -D` wrote",
            ) from error
        except OSError as error:
            raise unreadable(str(path), error) from error
        self.sizes: dict[str, int] = {}
        self.others: set[str] = set()
        self.bases: dict[str, int] = {}
        try:
            self._list()
        except OSError as error:
            self.close()
            raise unreadable(str(path), error) from error

    def _list(self) -> None:
        with os.scandir(self._fd) as found:
            for file in sorted(islice(found, _MAX_FILES), key=lambda file: file.name):
                if file.is_file(follow_symlinks=False):
                    self.sizes[file.name] = file.stat(follow_symlinks=False).st_size
                elif not file.is_dir(follow_symlinks=False):
                    self.others.add(file.name)

    def file(self, name: str) -> "ImageFile":
        """Return the image `name`.

        Raises:
            ImagesDamaged: it is missing.
            ImagesUnsupported: it is a symbolic link or another special file.
        """
        if name in self.others:
            raise ImagesUnsupported(
                f"{self.label}{name}: not a regular file",
                "replace links in the image directory by the files themselves",
            )
        if name not in self.sizes:
            raise ImagesDamaged(f"{self.label}{name}: missing", DUMP_AGAIN)
        return ImageFile(self, name, self.sizes[name], self.bases.get(name, 0))

    def open(self, name: str) -> int:
        """Return a new read-only descriptor of a regular file; the caller closes it."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=self._fd)
        except OSError as error:
            gone = (errno.ENOENT, errno.ELOOP)  # replaced since the directory was listed
            raise unreadable(f"{self.label}{name}", error, damaged=gone, cure=DUMP_AGAIN) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ImagesDamaged(f"{self.label}{name}: changed while it was read", DUMP_AGAIN)
        return fd

    def read(self, name: str, limit: int = _MAX_READ) -> bytes:
        """Return the whole content of a file of at most `limit` bytes."""
        file = self.file(name)
        if file.size > limit:
            raise ImagesUnsupported(
                f"{self.label}{name}: {file.size} bytes, more than the {limit} that are read",
                "is this an image? If it is, please report it",
            )
        return file.read(0, file.size)

    def parent(self) -> "ImageDirectory | None":
        """Return the directory of the previous dump, or None for a full dump.

        Raises:
            ImagesDamaged: ``parent`` is a dangling link.
            ImagesUnsupported: it leads out of the directory that contains the image directory.
        """
        home = self.path.resolve()
        if not os.path.lexists(home / PARENT):
            return None
        target = (home / PARENT).resolve()
        if not target.is_dir():
            raise ImagesDamaged(
                f"{self.label}parent: leads to {target}, which is no directory",
                "put the images of the earlier dumps where the link points",
            )
        if not target.is_relative_to(home.parent):
            raise ImagesUnsupported(
                f"{self.label}parent: leads to {target}, outside of {home.parent}",
                "keep the images of a chain of dumps side by side in one directory",
            )
        return ImageDirectory(target, f"{self.label}parent/")

    def close(self) -> None:
        """Close the directory; open files stay open."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _not_a_directory(path: Path) -> OvrError:
    with suppress(OSError), path.open("rb") as file:
        if found := packing(file.read(HEAD_SIZE)):
            return ImagesUnsupported(
                f"{path}: packed with {found[0]}, no directory of images",
                "unpack it, and give the directory that the images are in then",
            )
    return UsageError(
        f"{path}: no directory of images",
        "give the directory that `criu dump -D` wrote; a stream of criu-image-streamer must be"
        " extracted into one first",
    )


@dataclass(frozen=True)
class ImageFile:
    """A file of an image directory, opened only when needed.

    Attributes:
        directory: the directory that contains it.
        name: its name there.
        size: its size in bytes when the directory was opened.
        base: offset in bytes of its content in the file that `open` opens.
    """

    directory: ImageDirectory
    name: str
    size: int
    base: int = 0

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.directory.label}{self.name}"

    def open(self) -> int:
        """Return a new read-only descriptor, the content at `base`; the caller closes it.

        Raises:
            ImagesDamaged: the file was replaced by something else, or became shorter.
            ImagesForbidden, ImagesUnreachable: it cannot be opened.
        """
        fd = self.directory.open(self.name)
        present = os.fstat(fd).st_size
        if present < self.base + self.size:
            os.close(fd)
            raise ImagesDamaged(f"{self.label}: shrank while it was read", DUMP_AGAIN)
        return fd

    def check_readable(self) -> None:
        """Read its first and its last byte.

        Raises:
            ImagesDamaged, ImagesForbidden, ImagesUnreachable: as `read`.
        """
        for offset in {0, self.size - 1} if self.size else ():
            self.read(offset, 1)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`.

        Raises:
            ImagesDamaged: the file ends before that.
            ImagesForbidden, ImagesUnreachable: it cannot be read.
        """
        fd = self.open()
        try:
            return read_exactly(fd, self.base + offset, size, self.label)
        finally:
            os.close(fd)


def read_exactly(fd: int, offset: int, size: int, label: str) -> bytes:
    """Return `size` bytes from `offset` of an open file, in as many reads as it takes."""
    parts = []
    while size:
        try:
            part = os.pread(fd, size, offset)
        except OSError as error:
            raise unreadable(label, error) from error
        if not part:
            raise ImagesDamaged(f"{label}: ends at byte {offset}, {size} more needed", DUMP_AGAIN)
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)
