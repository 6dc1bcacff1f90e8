"""Checkpoint archives: what ``podman container checkpoint --export`` and CRI-O write.

A tar of the container's configuration, what has changed in its root file system and volumes, and
CRIU's images in ``checkpoint/``. Images are read in place; `Archive.with_images` makes the same
archive with other images.
"""

import json
import os
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
from ovr.images.unpack import open_tar

__all__ = ["Archive", "Container"]

_IMAGES: Final = "checkpoint/"
_PARENT: Final = "checkpoint/parent"
_CONFIG: Final = "config.dump"
_SPEC: Final = "spec.dump"
_MAX_JSON: Final = 64 << 20
_MAX_MEMBERS: Final = 1 << 20
_CHUNK: Final = 1 << 20
_END: Final = bytes(2 * tarfile.BLOCKSIZE)


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
        self._fd = open_tar(path)
        try:
            self._size = os.fstat(self._fd).st_size
            self._members = self._read_members()
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
                yield from self._copy(member.offset, _padded(member.offset_data + _stored(member)))
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
        if member is None or not member.isreg():
            raise ImagesDamaged(f"{self.path}: no file {name} in it", DUMP_AGAIN)
        if member.size > limit:
            raise ImagesUnsupported(f"{self.path}: {name} has {member.size} bytes", DUMP_AGAIN)
        return read_exactly(self._fd, member.offset_data, member.size, name)

    def _read_members(self) -> dict[str, tarfile.TarInfo]:
        members: dict[str, tarfile.TarInfo] = {}
        os.lseek(self._fd, 0, os.SEEK_SET)  # what unpacked it has left it at its end
        try:
            with (
                os.fdopen(os.dup(self._fd), "rb") as file,
                tarfile.open(fileobj=file, mode="r:") as tar,
            ):
                for member in tar:
                    name = member.name.removeprefix("./")
                    if name in members or len(members) == _MAX_MEMBERS:
                        raise ImagesDamaged(f"{self.path}: {name} occurs twice", DUMP_AGAIN)
                    if member.issparse():
                        raise ImagesUnsupported(
                            f"{self.path}: {name} is stored as a sparse file",
                            "unpack the archive, and pack it again without --sparse",
                        )
                    if _padded(member.offset_data + _stored(member)) > self._size:
                        raise ImagesDamaged(f"{self.path}: cut off in {name}", DUMP_AGAIN)
                    members[name] = member
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ImagesDamaged(f"{self.path}: damaged: {error}", DUMP_AGAIN) from error
        return members

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
            volumes=tuple(_volumes(config)),
        )

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
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

    def __init__(self, path: Path, fd: int, members: Mapping[str, tarfile.TarInfo]) -> None:
        self.label = ""
        self.path = path
        self._fd = os.dup(fd)
        self.sizes, self.others, self.bases = {}, set(), {}
        for full, member in sorted(members.items()):
            name = full.removeprefix(_IMAGES)
            if name == full or not name or "/" in name or member.isdir():
                continue
            if member.isreg():
                self.sizes[name], self.bases[name] = member.size, member.offset_data
            else:
                self.others.add(name)

    def open(self, name: str) -> int:
        """A new descriptor of the archive; the content of `name` begins at its base."""
        return os.dup(self._fd)

    def parent(self) -> None:
        """Archives that build on others are refused as a whole."""


def _stored(member: tarfile.TarInfo) -> int:
    # Bytes of data that follow the header.
    return member.size if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES else 0


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _member(name: str, image: bytes | Extents) -> Iterable[bytes]:
    size = len(image) if isinstance(image, bytes) else image.size
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, stat.S_IRUSR | stat.S_IWUSR
    yield info.tobuf(tarfile.PAX_FORMAT)
    yield from image_chunks(image)
    yield bytes(_padded(size) - size)


def _text(config: Mapping[str, Any], name: str) -> str:
    # Only shown, and compared with what we know.
    found = config.get(name)
    return found if isinstance(found, str) else ""


def _volumes(config: Mapping[str, Any]) -> Iterator[str]:
    found = config.get("namedVolumes")
    for volume in found if isinstance(found, list) else ():
        name = volume.get("volumeName") if isinstance(volume, dict) else None
        if isinstance(name, str):
            yield name
