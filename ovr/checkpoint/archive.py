"""Read the checkpoint archives that ``podman container checkpoint --export`` and CRI-O write.

An archive is a tar of the container's configuration, the changes in its root file system and
volumes, and CRIU's images in ``checkpoint/``. Images are read in place; `Archive.with_images` makes
the same archive with other images. An archive made with ``--with-previous`` builds on the archive
of a pre-checkpoint (`ovr.checkpoint.archived`).
"""

import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from ovr.checkpoint.archived import OF_PRE_CHECKPOINT, ArchivedDirectory
from ovr.checkpoint.tar import BLOCK, padded
from ovr.checkpoint.tarball import Tarball
from ovr.errors import ImagesDamaged, ImagesUnsupported, UsageError
from ovr.images.directory import PARENT
from ovr.images.framing import DUMP_AGAIN
from ovr.images.imageset import ImageSet
from ovr.images.rewrite import Slices, image_chunks

__all__ = ["Archive", "BareArchive", "Container"]

_IMAGES: Final = "checkpoint/"
_IMAGE: Final = ".img"
_PRE_DUMP: Final = "pre-checkpoint/"
_CONFIG: Final = "config.dump"
_SPEC: Final = "spec.dump"
_MAX_VOLUMES: Final = 1024
_VOLUME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")  # podman's define.NameRegex
_END: Final = bytes(2 * BLOCK)
_LEAVE_OUT: Final = "leave out --import-previous"


@dataclass(frozen=True)
class Container:
    """The container of an archive.

    Attributes:
        maker: the program that wrote the archive: ``podman`` or ``CRI-O``.
        id: the container's id, 64 hexadecimal digits.
        name: its name.
        runtime: the program that ran it: ``crun``, ``runc``, …
        image: the name of the image it was made from.
        volumes: the names of its named volumes, which podman creates; it fails if one exists.
    """

    maker: str
    id: str
    name: str
    runtime: str
    image: str
    volumes: tuple[str, ...]


class Archive:
    """A checkpoint archive, read-only. Use as a context manager, or `close` it.

    Args:
        path: the file.
        previous: the archive of the pre-checkpoint that it builds on, if any.

    Attributes:
        path: the file.
        container: the archived container.
        images: CRIU's images in the archive.
    """

    def __init__(self, path: Path, previous: Path | None = None) -> None:
        self.path = path
        self._tarballs = [Tarball(path)]
        try:
            self.container = self._read_container()
            if previous is not None:
                self._tarballs.append(Tarball(previous))
                self._check_previous(previous)
            self.images = ImageSet(ArchivedDirectory(self._tarballs, _IMAGES))
            self._levels = [
                level for level in self.images.levels if isinstance(level, ArchivedDirectory)
            ]
            if previous is not None and self._levels[-1].tarball is self._own:
                self.images.close()
                raise UsageError(f"{path}: does not build on {previous}", _LEAVE_OUT)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path, previous: Path | None = None) -> Self:
        """Open the archive in the file `path`.

        Raises:
            UsageError: no such file, not an archive, no program or space to unpack it; or the
                pre-checkpoint that it builds on is missing or of another container.
            ImagesDamaged: it is truncated or contradicts itself.
            ImagesUnsupported: an archive of something else.
        """
        return cls(path, previous)

    def close(self) -> None:
        """Close the files, and delete the unpacked copies."""
        for tarball in self._tarballs:
            tarball.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.images.close()
        self.close()

    @property
    def _own(self) -> Tarball:
        return self._tarballs[0]

    def with_images(self, images: Mapping[str, bytes | Slices]) -> Iterator[bytes]:
        """Yield the archive in pieces, uncompressed, with `images` instead of CRIU's images.

        All other members are copied byte for byte, including files beside the images. Parent images
        and the link to them are left out, because `images` are complete.

        Raises:
            ImagesDamaged: the file became shorter.
        """
        ours = {_IMAGES + name for name in (*self.images.names, PARENT)}
        parents = {level.prefix for level in self._levels[1:] if level.tarball is self._own}
        for name in self._own.members:
            below_parent = any(f"{name}/".startswith(prefix) for prefix in parents)
            if name not in ours and not below_parent:
                yield from self._own.copy(name)
        for name, image in images.items():
            yield from _member(_IMAGES + name, image)
        yield _END

    def _check_previous(self, previous: Path) -> None:
        if _CONFIG not in self._tarballs[1].members:
            raise ImagesUnsupported(f"{previous}: no pre-checkpoint of podman", OF_PRE_CHECKPOINT)
        found = _text(self._tarballs[1].json(_CONFIG), "id")
        if found != self.container.id:
            raise UsageError(
                f"{previous}: of container {found[:12]}, but {self.path} is of"
                f" {self.container.id[:12]}",
                "give the archive of the last pre-checkpoint before the checkpoint",
            )

    def _read_container(self) -> Container:
        if not self._own.has_below(_IMAGES):
            raise self._something_else()
        if _CONFIG not in self._own.members or _SPEC not in self._own.members:
            raise ImagesUnsupported(
                f"{self.path}: images without a container's configuration ({_CONFIG}, {_SPEC})",
                f"unpack it: mkdir DIR && tar -C DIR -xf {self.path} && ovr restore -D DIR/…",
            )
        return _container_of(self._own)

    def _something_else(self) -> ImagesUnsupported:
        names = self._own.members
        if self._own.has_below(_PRE_DUMP):
            what = "a pre-checkpoint, after which the container ran on"
            cure = "give the checkpoint after it with --archive, this one with --import-previous"
        elif "manifest.json" in names or "index.json" in names or "oci-layout" in names:
            what, cure = "a container image", "give the checkpoint archive that it was made from"
        elif "pod.options" in names or "pod.dump" in names:
            what, cure = "a checkpoint of a whole pod", "checkpoint its containers one by one"
        elif "inventory.img" in names:
            what, cure = "bare CRIU images", "unpack it, and give the directory with -D"
        else:
            what, cure = "no checkpoint/ directory", "is it a checkpoint of podman or CRI-O?"
        return ImagesUnsupported(f"{self.path}: {what}", cure)


class BareArchive(Tarball):
    """An archive of podman's whose images are of no use: their memory is elsewhere. Not trusted.

    Args:
        path: the file.

    Attributes:
        container: the archived container.

    Raises:
        ImagesDamaged: it is truncated, or no checkpoint of a container.
        OvrError: as `Tarball`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        missing = [name for name in (_CONFIG, _SPEC) if name not in self.members]
        if missing or not self.has_below(_IMAGES):
            self.close()
            raise ImagesDamaged(
                f"{path}: podman's archive has no {' and no '.join(missing or [_IMAGES])}",
                "is it a version of podman that docs/podman.md names?",
            )
        try:
            self.container = _container_of(self)
        except BaseException:
            self.close()
            raise

    def with_images(self, images: Mapping[str, bytes | Slices]) -> Iterator[bytes]:
        """Yield the archive in pieces, uncompressed, with `images` instead of CRIU's images.

        All other members are copied byte for byte, including files beside the images.

        Raises:
            ImagesDamaged: the file became shorter.
        """
        for name in self.members:
            image = name.startswith(_IMAGES) and name.endswith(_IMAGE)
            if not image and name != _IMAGES + PARENT:
                yield from self.copy(name)
        for name, content in images.items():
            yield from _member(_IMAGES + name, content)
        yield _END


# The mode of CRIU's own images (CR_FD_PERM): CRIU opens some of them from inside the container's
# user namespace, as another user.
_MODE: Final = 0o644


def _member(name: str, image: bytes | Slices) -> Iterable[bytes]:
    size = len(image) if isinstance(image, bytes) else image.size
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, _MODE
    yield info.tobuf(tarfile.PAX_FORMAT)
    yield from image_chunks(image)
    yield bytes(padded(size) - size)


def _container_of(archive: Tarball) -> Container:
    config = archive.json(_CONFIG)
    return Container(
        maker="podman" if "spec" in config else "CRI-O",
        id=_text(config, "id"),
        name=_text(config, "name"),
        runtime=_text(config, "runtime"),
        image=_text(config, "rootfsImageName"),
        volumes=_volumes(archive.path, config),
    )


def _volumes(path: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    found = config.get("namedVolumes")
    volumes = [volume for volume in _list(found) if isinstance(volume, dict)]
    names = [volume.get("volumeName") for volume in volumes]
    if len(names) > _MAX_VOLUMES:
        raise ImagesDamaged(f"{path}: {len(names)} volumes", DUMP_AGAIN)
    for name in names:
        if not isinstance(name, str) or not _VOLUME.fullmatch(name):
            raise ImagesDamaged(f"{path}: {str(name)[:40]} is not a volume name", DUMP_AGAIN)
    return tuple(map(str, names))


def _text(config: Mapping[str, Any], name: str) -> str:
    # Untrusted text: used only in messages and comparisons.
    found = config.get(name)
    return found if isinstance(found, str) else ""


def _list(found: object) -> list[Any]:
    return found if isinstance(found, list) else []
