"""What is restored: images that CRIU alone is to restore, or a container that is its engine's.

Each kind says which images there are, what is sent into the guest, and who runs CRIU there.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, Self

from ovr.errors import CheckFailed, ImagesUnsupported, UsageError
from ovr.guest.protocol import ENGINE_ARCHIVE, HOOK_HELD
from ovr.images import Archive, Extents, ImageSet, image_chunks
from ovr.vm.session import Hello

__all__ = ["Checkpoint", "ImagesCheckpoint", "PodmanCheckpoint", "open_checkpoint"]

Inside = Mapping[str, bytes | Extents]

_CRIU_SECONDS: Final = 60.0
_ENGINE_SECONDS: Final = 300.0  # it unpacks a root file system first


class Checkpoint(ABC):
    """A checkpoint; a context manager.

    Attributes:
        images: CRIU's images, as they were dumped.
        engine: what runs CRIU in the guest; None: the agent.
        options: put at the end of its command line.
        patience: seconds that it may take.
    """

    images: ImageSet
    engine: ClassVar[str | None]
    options: tuple[str, ...] = ()
    patience: float = _CRIU_SECONDS

    @abstractmethod
    def files(self, inside: Inside) -> dict[str, Iterable[bytes]]:
        """Return what the agent gets, by file name, made of the inside image set."""

    def check(self, hello: Hello) -> None:
        """Raise `CheckFailed` if the guest cannot restore it."""
        if hello.criu is None:
            raise CheckFailed("the guest has no CRIU", "apt-get install criu, in the guest")
        if self.engine is not None and self.engine not in hello.engines:
            raise CheckFailed(
                f"the guest has no {self.engine}", f"apt-get install {self.engine}, in the guest"
            )

    def close(self) -> None:
        """Close what is open."""
        self.images.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ImagesCheckpoint(Checkpoint):
    """A directory that ``criu dump -D`` wrote.

    Args:
        path: the directory.
        options: further options for the guest's ``criu restore``.

    Raises:
        OvrError: as `ImageSet.open`.
    """

    engine = None

    def __init__(self, path: Path, options: Sequence[str] = ()) -> None:
        self.images = ImageSet.open(path)
        self.options = tuple(options)

    def files(self, inside: Inside) -> dict[str, Iterable[bytes]]:
        """Return the inside image set."""
        return {name: image_chunks(image) for name, image in inside.items()}


class PodmanCheckpoint(Checkpoint):
    """An archive that ``podman container checkpoint --export`` wrote.

    Args:
        path: the archive, packed or not.
        name: the container's new name; None keeps the old one.
        options: further options for the guest's ``podman container restore``.

    Raises:
        UsageError: options that would make podman restore something else.
        OvrError: as `Archive.open`.
    """

    engine = "podman"
    patience = _ENGINE_SECONDS

    def __init__(self, path: Path, *, name: str | None = None, options: Sequence[str] = ()) -> None:
        _check_podman_options(options)
        self._archive = Archive.open(path)
        self.images = self._archive.images
        self.options = (*(("--name", name) if name is not None else ()), *options)
        if self._archive.container.maker != "podman":
            self.close()
            raise ImagesUnsupported(
                f"{path}: written by {self._archive.container.maker}, not by podman",
                "podman cannot restore it; see docs/podman.md",
            )

    def files(self, inside: Inside) -> dict[str, Iterable[bytes]]:
        """Return the archive, with the inside image set in it."""
        return {ENGINE_ARCHIVE: self._archive.with_images(_held(self.images, inside))}

    def close(self) -> None:
        """Close the archive."""
        super().close()
        self._archive.close()


def _held(images: ImageSet, inside: Inside) -> Inside:
    # Were our hook not run, an empty tree would be let go: CRIU must not find all that it needs.
    needed = f"pagemap-{images.tasks[0].pid}.img"
    return {HOOK_HELD + name if name == needed else name: image for name, image in inside.items()}


# podman's own, which would name another checkpoint or hide the result.
_REFUSED: Final = {
    "-i": "the archive is what --archive names",
    "--import": "the archive is what --archive names",
    "--import-previous": "checkpoint without --with-previous",
    "-n": "use --name before the --",
    "--name": "use --name before the --",
    "-a": "the archive has one container",
    "--all": "the archive has one container",
    "-l": "the archive is what is restored",
    "--latest": "the archive is what is restored",
    "--print-stats": "the report has the times",
}


def _check_podman_options(options: Sequence[str]) -> None:
    for option in options:
        word = option.partition("=")[0]
        if word in _REFUSED or not word.startswith("-"):
            cure = _REFUSED.get(word, "write values as --option=value")
            raise UsageError(f"podman's {option} cannot be honoured", cure)


def open_checkpoint(
    images: str | Path | None = None,
    *,
    archive: str | Path | None = None,
    name: str | None = None,
    criu_options: Sequence[str] = (),
    engine_options: Sequence[str] = (),
) -> Checkpoint:
    """Open a directory of images or a container's archive; arguments as of `ovr.Vm.restore`.

    Raises:
        UsageError: not exactly one of both, or options of the other.
        OvrError: as `ImagesCheckpoint` and `PodmanCheckpoint`.
    """
    if archive is not None and images is None:
        if criu_options:
            raise UsageError(
                f"podman runs CRIU itself: {criu_options[0]} cannot be handed on",
                "podman has options of its own for it; they go behind --",
            )
        return PodmanCheckpoint(Path(archive), name=name, options=engine_options)
    if images is not None and archive is None and name is None and not engine_options:
        return ImagesCheckpoint(Path(images), criu_options)
    raise UsageError("images of a process, or the archive of a container?", "give one of them")
