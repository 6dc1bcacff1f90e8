"""Open checkpoints: images that CRIU restores alone, or a container that its engine restores.

Each class provides the images, the files that are sent into the guest, and the program that runs
CRIU there.
"""

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from ovr.checkpoint.archive import Archive, BareArchive
from ovr.errors import CheckFailed, ImagesUnsupported, UsageError
from ovr.guest.client.session import AgentInfo
from ovr.guest.protocol import ENGINE_ARCHIVE, HOOK_HELD
from ovr.host.closing import Closing
from ovr.images import ImageSet, Slices, image_chunks
from ovr.images.terminals import refuse_outside_terminals

__all__ = [
    "RUNTIMES",
    "Checkpoint",
    "ImagesCheckpoint",
    "PodmanCheckpoint",
    "RuntimeCheckpoint",
    "check_engine",
    "open_checkpoint",
    "runs_scripts_for_engines",
]

RUNTIMES: Final = ("runc", "crun")
"""The engines that restore images into a bundle."""

Images = Mapping[str, bytes | Slices]

_SCRIPTS_FOR_ENGINES: Final = (3, 19)  # "action-scripts: allow shell scripts in rpc mode"
_DESCRIPTORS: Final = "descriptors.json"  # runc and crun put it beside CRIU's images


class Checkpoint(Closing):
    """A checkpoint; a context manager.

    Attributes:
        images: CRIU's images, as they were dumped.
        engine: the container engine that runs CRIU in the guest; None: the agent runs it.
        container: the container's name, for engines that report no id.
        options: put at the end of the command line of CRIU or the engine.
        volumes: the named volumes that the engine creates in the guest.
    """

    images: ImageSet
    engine: str | None
    container: str | None = None
    options: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()

    @abstractmethod
    def files(self, inside: Images) -> dict[str, Iterable[bytes]]:
        """Return the files for the agent by name, made from the inside image set."""

    def check(self, hello: AgentInfo) -> None:
        """Raise `CheckFailed` if the guest cannot restore this checkpoint."""
        _check_criu(hello)
        if self.engine is not None:
            check_engine(hello, self.engine)

    def close(self) -> None:
        """Close the images."""
        self.images.close()


class ImagesCheckpoint(Checkpoint):
    """A directory that ``criu dump -D`` wrote.

    Args:
        path: the directory.
        options: further options for the guest's ``criu restore``.

    Raises:
        ImagesUnsupported: as `refuse_outside_terminals`.
        OvrError: as `ImageSet.open`.
    """

    engine = None

    def __init__(self, path: Path, options: Sequence[str] = ()) -> None:
        self.images = ImageSet.open(path)
        try:
            refuse_outside_terminals(self.images)
        except BaseException:
            self.close()
            raise
        self.options = tuple(options)

    def files(self, inside: Images) -> dict[str, Iterable[bytes]]:
        """Return the inside image set."""
        return {name: image_chunks(image) for name, image in inside.items()}


class PodmanCheckpoint(Checkpoint):
    """An archive that ``podman container checkpoint --export`` wrote.

    Args:
        archive: the archive; closed with this.
        images: CRIU's images, which need not be those in the archive; likewise.
        name: the container's new name; None keeps the old one.
        options: further options for the guest's ``podman container restore``.
    """

    engine = "podman"

    def __init__(
        self,
        archive: Archive | BareArchive,
        images: ImageSet,
        *,
        name: str | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._archive = archive
        self.images = images
        # podman fails if a volume exists; with that option it creates none.
        if not any(option.startswith("--ignore-volumes") for option in options):
            self.volumes = archive.container.volumes
        self.options = (*(("--name", name) if name is not None else ()), *options)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        previous: Path | None = None,
        name: str | None = None,
        options: Sequence[str] = (),
    ) -> Self:
        """Open the archive in a file; arguments as for the class.

        Args:
            path: the archive, packed or not.
            previous: the archive of the pre-checkpoint that it builds on, if any.
            name: the container's new name.
            options: for podman.

        Raises:
            UsageError: options that would make podman restore something else.
            ImagesUnsupported: the archive of another program than podman.
            OvrError: as `Archive.open`.
        """
        _check_podman_options(options)
        archive = Archive.open(path, previous)
        found = cls(archive, archive.images, name=name, options=options)
        if (maker := archive.container.maker) != "podman":
            found.close()
            raise ImagesUnsupported(
                f"{path}: written by {maker}, not by podman",
                "podman cannot restore it: give --runtime and --bundle, see docs/podman.md",
            )
        return found

    def files(self, inside: Images) -> dict[str, Iterable[bytes]]:
        """Return the archive with the inside image set."""
        return {ENGINE_ARCHIVE: self._archive.with_images(_held(self.images, inside))}

    def close(self) -> None:
        """Close images and archive."""
        super().close()
        self._archive.close()


class RuntimeCheckpoint(Checkpoint):
    """Images of a container that runc or crun restores into a bundle in the guest.

    Args:
        source: the directory that ``runc checkpoint --image-path`` wrote, or an archive with such
            images.
        archive: whether `source` is an archive.
        previous: as in `PodmanCheckpoint`.
        runtime: ``runc`` or ``crun``.
        bundle: the guest's directory with ``config.json`` and the root file system.
        name: the name of the new container.
        options: further options for the guest's ``runc restore``.

    Raises:
        UsageError: an unknown runtime.
        OvrError: as `ImageSet.open` and `Archive.open`.
    """

    engine = None

    def __init__(
        self,
        source: Path,
        *,
        archive: bool,
        previous: Path | None = None,
        runtime: str,
        bundle: str,
        name: str,
        options: Sequence[str] = (),
    ) -> None:
        if runtime not in RUNTIMES:
            raise UsageError(f"no container runtime {runtime!r}", f"take {' or '.join(RUNTIMES)}")
        self.engine = runtime
        self.container = name
        self.options = (*options, "--bundle", bundle, name)
        self._archive = Archive.open(source, previous) if archive else None
        self.images = self._archive.images if self._archive else ImageSet.open(source)

    def files(self, inside: Images) -> dict[str, Iterable[bytes]]:
        """Return the inside image set and the runtime's file on the standard descriptors."""
        held = _held(self.images, inside)
        files: dict[str, Iterable[bytes]] = {
            name: image_chunks(image) for name, image in held.items()
        }
        if self.images.has(_DESCRIPTORS):
            files[_DESCRIPTORS] = iter((self.images.read(_DESCRIPTORS),))
        return files

    def close(self) -> None:
        """Close images and archive."""
        super().close()
        if self._archive:
            self._archive.close()


def check_engine(hello: AgentInfo, engine: str) -> None:
    """Raise `CheckFailed` if the guest has no such engine, or no CRIU that runs our hook for it."""
    _check_criu(hello)
    if engine not in hello.engines:
        raise CheckFailed(f"the guest has no {engine}", f"apt-get install {engine}, in the guest")
    if not runs_scripts_for_engines(hello):
        error = CheckFailed(
            f"the guest's CRIU {hello.criu} runs no action scripts for {engine}",
            "use CRIU 3.19 or later in the guest",
        )
        error.code = "engine-scripts"
        raise error


def _check_criu(hello: AgentInfo) -> None:
    if hello.criu is None:
        raise CheckFailed("the guest has no CRIU", "apt-get install criu, in the guest")


def runs_scripts_for_engines(hello: AgentInfo) -> bool:
    """Return whether the guest's CRIU runs configured action scripts for container engines."""
    numbers = (int(number) for number in re.findall(r"\d{1,9}", hello.criu or ""))
    return tuple(numbers) >= _SCRIPTS_FOR_ENGINES


def _held(images: ImageSet, inside: Images) -> Images:
    # Without our hook CRIU would let an empty tree run. So one image that CRIU needs gets another
    # name, which the hook changes back.
    needed = f"pagemap-{images.tasks[0].pid}.img"
    return {HOOK_HELD + name if name == needed else name: image for name, image in inside.items()}


# Options of podman that would select another checkpoint or hide the result.
_REFUSED: Final = {
    "-i": "the archive is what --archive names",
    "--import": "the archive is what --archive names",
    "--import-previous": "use --import-previous before the --",
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
            raise UsageError(f"podman's option {option} cannot be passed on", cure)


def open_checkpoint(
    images: str | Path | None = None,
    *,
    archive: str | Path | None = None,
    previous: str | Path | None = None,
    name: str | None = None,
    runtime: str | None = None,
    bundle: str | None = None,
    criu_options: Sequence[str] = (),
    engine_options: Sequence[str] = (),
) -> Checkpoint:
    """Open a directory of images or a container's archive; arguments as for `ovr.Vm.restore`.

    Raises:
        UsageError: not exactly one of both, or options that exclude each other.
        OvrError: as the classes above.
    """
    source = archive if images is None else images
    if source is None or (images is not None and archive is not None):
        raise UsageError(
            "either images or the archive of a container can be restored", "give one of them"
        )
    before = None if previous is None else Path(previous)
    if before is not None and archive is None:
        raise UsageError(
            "--import-previous needs --archive",
            "earlier images in directories are found by their `parent` links",
        )
    if (runtime is None) != (bundle is None) or (runtime is not None and name is None):
        raise UsageError(
            "a container runtime needs a bundle in the guest, and a name for the container",
            "give --runtime, --bundle and --name",
        )
    if criu_options and (runtime or archive is not None):
        raise UsageError(
            f"{runtime or 'podman'} runs CRIU itself: {criu_options[0]} cannot be passed on",
            f"give options of {runtime or 'podman'} after --",
        )
    if runtime is not None and bundle is not None and name is not None:
        return RuntimeCheckpoint(
            Path(source), archive=archive is not None, previous=before, runtime=runtime,
            bundle=bundle, name=name, options=engine_options,
        )  # fmt: skip
    if archive is not None:
        return PodmanCheckpoint.open(
            Path(archive), previous=before, name=name, options=engine_options
        )
    if name is not None or engine_options:
        stray = engine_options[0] if engine_options else "--name"
        raise UsageError(f"{stray} needs a container", "give --archive or --runtime")
    return ImagesCheckpoint(Path(source), criu_options)
