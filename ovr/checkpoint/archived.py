"""Read directories of images within archives, and follow the links to their parents.

podman exports a checkpoint that builds on a pre-checkpoint as a separate archive, in which
``checkpoint/parent`` links to ``../pre-checkpoint`` in the archive of the pre-checkpoint. Links are
resolved by name within the archives, never in the host's file system.
"""

import os
import posixpath
from collections.abc import Sequence
from typing import Final

from ovr.checkpoint.tarball import Tarball
from ovr.errors import ImagesDamaged, ImagesUnsupported, UsageError
from ovr.images.directory import PARENT, ImageDirectory
from ovr.images.framing import DUMP_AGAIN

__all__ = ["OF_PRE_CHECKPOINT", "ArchivedDirectory"]

OF_PRE_CHECKPOINT: Final = (
    "give with --import-previous the last archive before it that `podman container checkpoint"
    " --pre-checkpoint --export FILE` wrote"
)


class ArchivedDirectory(ImageDirectory):
    """The members of an archive that lie directly below `prefix`, as a directory of images.

    Args:
        tarballs: the archive that contains it, then others that may contain its parent.
        prefix: its name and a slash.
        label: as in `ImageDirectory`.

    Attributes:
        tarball: the archive that contains it.
        prefix: its name there, and a slash.
    """

    def __init__(self, tarballs: Sequence[Tarball], prefix: str, label: str = "") -> None:
        self.tarball, *self._others = tarballs
        self.prefix = prefix
        self.label = label
        self.path = self.tarball.path
        self._fd = os.dup(self.tarball.fd)
        self.sizes, self.others, self.bases = {}, set(), {}
        for full, member in sorted(self.tarball.members.items()):
            name = full.removeprefix(prefix)
            if name == full or not name or "/" in name or member.is_directory:
                continue
            if member.is_file:
                self.sizes[name], self.bases[name] = member.size, member.offset_data
            else:
                self.others.add(name)

    def open(self, name: str) -> int:
        """Return a new descriptor of the archive; the content of `name` begins at its base."""
        return os.dup(self._fd)

    def parent(self) -> "ArchivedDirectory | None":
        """Return the directory of the previous dump, or None for a full dump.

        Raises:
            UsageError: it is in another archive, which was not given.
            ImagesDamaged: ``parent`` is not a link.
            ImagesUnsupported: it leads out of the archive, or no archive has that directory.
        """
        link = self.tarball.members.get(self.prefix + PARENT)
        if link is None:
            return None
        if not link.is_symlink:
            raise ImagesDamaged(f"{self.path}: {link.name} is not a symbolic link", DUMP_AGAIN)
        target = posixpath.normpath(posixpath.join(self.prefix, link.link))
        if not link.link or target in (".", "..") or target.startswith(("/", "../")):
            raise ImagesUnsupported(
                f"{self.path}: {link.name} leads to {link.link[:80]!r}, out of the archive",
                "podman makes no such archive: checkpoint again",
            )
        for at, tarball in enumerate((self.tarball, *self._others)):
            if tarball.has_below(f"{target}/"):
                found = (self.tarball, *self._others)[at:]
                return ArchivedDirectory(found, f"{target}/", f"{self.label}parent/")
        raise self._missing(target)

    def _missing(self, target: str) -> UsageError | ImagesUnsupported:
        if not self._others:
            return UsageError(
                f"{self.path}: builds on {target}, which is not in it", OF_PRE_CHECKPOINT
            )
        return ImagesUnsupported(
            f"{self._others[0].path}: does not contain {target}, on which {self.path} builds",
            OF_PRE_CHECKPOINT,
        )
