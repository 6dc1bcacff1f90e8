"""Checkpoint archives: what ``podman container checkpoint --export`` and CRI-O write.

A tar of the container's configuration, what has changed in its root file system and volumes, and
CRIU's images in ``checkpoint/``. Images are read in place; `Archive.with_images` makes the same
archive with other images.
"""

import json
import os
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from ovr.errors import ImagesDamaged, ImagesUnsupported
from ovr.images.directory import ImageDirectory, read_exactly
from ovr.images.framing import DUMP_AGAIN
from ovr.images.imageset import ImageSet
from ovr.images.rewrite import Extents, image_chunks
from ovr.images.tar import BLOCK, Member, padded
from ovr.images.unpack import open_tar

__all__ = ["Archive", "Container"]

_IMAGES: Final = "checkpoint/"
_PARENT: Final = "checkpoint/parent"
_CONFIG: Final = "config.dump"
_SPEC: Final = "spec.dump"
_MAX_JSON: Final = 4 << 20  # podman's config.dump has some 20 KiB
_CHUNK: Final = 1 << 20
_MAX_VOLUMES: Final = 1024
_VOLUME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")  # podman's define.NameRegex
_END: Final = bytes(2 * BLOCK)


@dataclass(frozen=True)
class Container:
    """What an archive says of its container.

    Attributes:
        maker: who wrote the archive: ``podman`` or ``CRI-O``.
        id: its id, 64 hexadecimal digits.
        name: its name.
        runtime: the program that ran it: ``crun``, ``runc``, …
        image: the image it was made from, as people call it.
        volumes: the names of its named volumes, which podman makes, and refuses if they exist.
    """

    maker: str
    id: str
    name: str
    runtime: str
    image: str
    volumes: tuple[str, ...]


class Archive:
    """A checkpoint archive, read-only. Use as a context manager, or `close` it.

    Attributes:
        path: the file.
        container: what it says of its container.
        images: CRIU's images in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd, self._members = open_tar(path)
        try:
            self.container = self._read_container()
            self.images = ImageSet(_Members(path, self._fd, self._members))
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the archive in the file `path`.

        Raises:
            UsageError: no such file, no archive, or no program or room to unpack it.
            ImagesDamaged: it is cut off or contradicts itself.
            ImagesUnsupported: an archive of something else, or a checkpoint that builds on another.
        """
        return cls(path)

    def close(self) -> None:
        """Close the file; what was unpacked is gone with it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.images.close()
        self.close()

    def with_images(self, images: Mapping[str, bytes | Extents]) -> Iterator[bytes]:
        """The archive in pieces, uncompressed, with `images` instead of CRIU's images.

        All other members are byte for byte what they were, files beside the images too.

        Raises:
            ImagesDamaged: the file has become shorter.
        """
        ours = {_IMAGES + name for name in self.images.names}
        for name, member in self._members.items():
            if name not in ours:
                yield from self._copy(member.offset, member.end)
        for name, image in images.items():
            yield from _member(_IMAGES + name, image)
        yield _END

    def read(self, name: str, limit: int = _MAX_JSON) -> bytes:
        """The whole content of the member `name`.

        Raises:
            ImagesDamaged: it is not there, or no file.
            ImagesUnsupported: it is larger than `limit` bytes.
        """
        member = self._members.get(name)
        if member is None or not member.is_file:
            raise ImagesDamaged(f"{self.path}: no file {name} in it", DUMP_AGAIN)
        if member.size > limit:
            raise ImagesUnsupported(f"{self.path}: {name} has {member.size} bytes", DUMP_AGAIN)
        return read_exactly(self._fd, member.offset_data, member.size, name)

    def _read_container(self) -> Container:
        if not any(name.startswith(_IMAGES) for name in self._members):
            raise self._something_else()
        if _PARENT in self._members:
            raise ImagesUnsupported(
                f"{self.path}: builds on a pre-checkpoint, which is another archive",
                "checkpoint without --with-previous",
            )
        if _CONFIG not in self._members or _SPEC not in self._members:
            raise ImagesUnsupported(
                f"{self.path}: images, but no container's configuration ({_CONFIG}, {_SPEC})",
                f"unpack it: mkdir DIR && tar -C DIR -xf {self.path} && ovr restore -D DIR/…",
            )
        config = self._json(_CONFIG)
        return Container(
            maker="podman" if "spec" in config else "CRI-O",
            id=_text(config, "id"),
            name=_text(config, "name"),
            runtime=_text(config, "runtime"),
            image=_text(config, "rootfsImageName"),
            volumes=self._volumes(config),
        )

    def _volumes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        found = config.get("namedVolumes")
        volumes = [volume for volume in _list(found) if isinstance(volume, dict)]
        names = [volume.get("volumeName") for volume in volumes]
        if len(names) > _MAX_VOLUMES:
            raise ImagesDamaged(f"{self.path}: {len(names)} volumes", DUMP_AGAIN)
        for name in names:
            if not isinstance(name, str) or not _VOLUME.fullmatch(name):
                raise ImagesDamaged(
                    f"{self.path}: {str(name)[:40]} is no name of a volume", DUMP_AGAIN
                )
        return tuple(map(str, names))

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self.read(name))
        except RecursionError as error:
            raise ImagesDamaged(f"{self.path}: {name} is nested too deeply", DUMP_AGAIN) from error
        except ValueError as error:
            raise ImagesDamaged(f"{self.path}: {name} is no JSON: {error}", DUMP_AGAIN) from error
        if not isinstance(found, dict):
            raise ImagesDamaged(f"{self.path}: {name} is no JSON object", DUMP_AGAIN)
        return found

    def _something_else(self) -> ImagesUnsupported:
        names = self._members
        if any(name.startswith("pre-checkpoint/") for name in names):
            what, cure = "a pre-checkpoint: the container ran on", "take the checkpoint after it"
        elif "manifest.json" in names or "index.json" in names or "oci-layout" in names:
            what, cure = "a container image", "give the checkpoint archive that it was made from"
        elif "pod.options" in names or "pod.dump" in names:
            what, cure = "a checkpoint of a whole pod", "checkpoint its containers one by one"
        elif "inventory.img" in names:
            what, cure = "bare CRIU images", "unpack it, and give the directory with -D"
        else:
            what, cure = "no checkpoint/ directory in it", "is it a checkpoint of podman or CRI-O?"
        return ImagesUnsupported(f"{self.path}: {what}", cure)

    def _copy(self, start: int, end: int) -> Iterator[bytes]:
        for at in range(start, end, _CHUNK):
            yield read_exactly(self._fd, at, min(_CHUNK, end - at), str(self.path))


class _Members(ImageDirectory):
    """The members of an archive that lie in ``checkpoint/``, as a directory of images."""

    def __init__(self, path: Path, fd: int, members: Mapping[str, Member]) -> None:
        self.label = ""
        self.path = path
        self._fd = os.dup(fd)
        self.sizes, self.others, self.bases = {}, set(), {}
        for full, member in sorted(members.items()):
            name = full.removeprefix(_IMAGES)
            if name == full or not name or "/" in name or member.is_directory:
                continue
            if member.is_file:
                self.sizes[name], self.bases[name] = member.size, member.offset_data
            else:
                self.others.add(name)

    def open(self, name: str) -> int:
        """A new descriptor of the archive; the content of `name` begins at its base."""
        return os.dup(self._fd)

    def parent(self) -> None:
        """Archives that build on others are refused as a whole."""


def _member(name: str, image: bytes | Extents) -> Iterable[bytes]:
    size = len(image) if isinstance(image, bytes) else image.size
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, stat.S_IRUSR | stat.S_IWUSR
    yield info.tobuf(tarfile.PAX_FORMAT)
    yield from image_chunks(image)
    yield bytes(padded(size) - size)


def _text(config: Mapping[str, Any], name: str) -> str:
    # Only shown, and compared with what we know.
    found = config.get(name)
    return found if isinstance(found, str) else ""


def _list(found: object) -> list[Any]:
    return found if isinstance(found, list) else []
