"""Containers of podman's that are moved: their options, and their archives.

podman in the destination needs the container's configuration and the changes in its root file
system before it runs CRIU. podman in the source writes them when its CRIU has let the tree go; the
tree stays frozen all the same, because it is prepared.
"""

from collections.abc import Callable, Sequence
from typing import IO, Final

from ovr.checkpoint import BareArchive, PodmanCheckpoint
from ovr.dump.container import PODMAN, Container, check_name
from ovr.dump.output import NewImages, writable
from ovr.errors import ImagesDamaged, ImagesUnsupported, UsageError
from ovr.guest.protocol import MAX_IMAGE_BYTES
from ovr.images import ImageSet
from ovr.move.commit import Commit

__all__ = ["checkpoint_options", "moved_container", "to_move"]

_BOTH: Final = ("--file-locks", "--ignore-rootfs", "--ignore-volumes")
"""Options of ``podman container checkpoint`` and of ``podman container restore``."""
_OF_RESTORE: Final = ("--ignore-static-ip", "--ignore-static-mac", "--publish")
_ARCHIVE: Final = "podman.tar"


def to_move(
    tree: int | str, *, criu_options: Sequence[str], engine_options: Sequence[str]
) -> int | Container:
    """Return the tree that is to be moved.

    Args:
        tree: a pid; or the name or id of a container of podman's.
        criu_options: of these a container can have ``--file-locks``.
        engine_options: for podman.

    Raises:
        UsageError: a name that no container has, or an option that does not apply to it.
    """
    if isinstance(tree, int):
        if engine_options:
            raise UsageError("options after -- need a container", "give --container NAME")
        return tree
    check_name(tree)
    if "--tcp-established" in criu_options:
        error = UsageError(
            "the connections of a container cannot be moved: its network is open in the source"
            " before the destination has it",
            "let its clients connect again, and leave out --tcp-established",
        )
        error.code = "container-tcp"
        raise error
    for option in (*criu_options, *engine_options):
        if option.partition("=")[0] not in (*_BOTH, *_OF_RESTORE):
            raise UsageError(
                f"the option {option} cannot be passed on to podman",
                f"with --container there may be {', '.join((*_BOTH, *_OF_RESTORE))}, after --;"
                " values as --option=value",
            )
    return Container(PODMAN, tree, (*criu_options, *engine_options))


def checkpoint_options(container: Container) -> tuple[str, ...]:
    """Return the options for ``podman container checkpoint``."""
    return tuple(one for one in container.options if one.partition("=")[0] in _BOTH)


def moved_container(commit: Commit, container: Container, images: NewImages) -> PodmanCheckpoint:
    """Fetch the archive of a prepared container; return it with other images.

    Args:
        commit: has prepared it.
        container: the container.
        images: its images; gets the archive, too.

    Raises:
        ImagesDamaged: podman's archive is invalid.
        ImagesUnsupported: it is larger than the destination's agent takes.
        UsageError: it cannot be written.
        OvrError: as `Commit.archive`.
    """
    path = images.path / _ARCHIVE
    with writable(path), path.open("xb") as file:
        commit.archive(_saver(file))
    try:
        archive = BareArchive(path)
    except UsageError as error:
        raise ImagesDamaged(
            "podman in the source has written no archive",
            "is it a version of podman that docs/podman.md names?",
        ) from error
    try:
        saved = ImageSet.open(images.path)
    except BaseException:
        archive.close()
        raise
    return PodmanCheckpoint(archive, saved, options=container.options)


def _saver(file: IO[bytes]) -> Callable[[bytes], None]:
    def save(data: bytes) -> None:
        # It is in the host's memory, and has no memory of the container.
        if file.tell() + len(data) > MAX_IMAGE_BYTES:
            raise ImagesUnsupported(
                f"podman's archive has more than {MAX_IMAGE_BYTES >> 20} MiB: changes in the root"
                " file system, and volumes",
                "keep data on storage that both VMs have; volumes are left out with"
                " -- --ignore-volumes",
            )
        file.write(data)

    return save
