"""The archive of a dumped container, as ``podman container checkpoint --export`` writes it.

podman in the guest writes one without the memory, which the agent sends. This has its members, byte
for byte, but for CRIU's images: these are the ones that were made outside.
"""

import fcntl
import os
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from ovr.checkpoint import BareArchive
from ovr.dump.output import Staging, free_name, runs_on, writable
from ovr.errors import ArchiveFailed, ImagesDamaged, OvrError, UsageError
from ovr.guest.client.agent import Agent
from ovr.host import locate
from ovr.images import ImageSet
from ovr.images.rewrite import InsideImages
from ovr.images.stats import STATS_DUMP

__all__ = ["Export"]

_PROGRAMS: Final[dict[str, tuple[str, ...]]] = {
    ".tar": (),
    ".zst": ("zstd", "-q", "-c", "-T0"),
    ".gz": ("gzip", "-c"),
    ".tgz": ("gzip", "-c"),
}
"""Suffix of an archive, and the program that packs it."""
_PODMANS: Final = "podman.tar"
_FINISHED: Final = ".finished"
_SPARE: Final = 1 << 30  # bytes to leave free on the file system, or a tenth of its size if less
_STATS_LIMIT: Final = 1 << 16


class Export(Staging):
    """A new archive; a context manager.

    Images and podman's part are collected in a directory beside it, which is removed when this is
    closed. If the container has ended and the archive cannot be completed, that directory is kept.

    Args:
        file: the archive.
        left_running: the container runs on after the dump: nothing is lost by a failure.
        stream: a descriptor that gets the archive in place of the file: only the images are kept
            beside that.

    Raises:
        UsageError: the file exists or cannot be written, or is to be packed by a program that is
            not there; the stream is a terminal, or is not open for writing.
    """

    def __init__(self, file: Path, *, left_running: bool, stream: int | None = None) -> None:
        self._file = file
        self._stream = stream
        self._shown = Path("standard output") if stream is not None else file
        if stream is not None:
            _check_stream(stream)
        self._pack = _packer(file)
        self._left_running = left_running
        self._told = False
        self._archive: IO[bytes] | None = None
        with writable(file):
            directory, self._name = locate(file)
            super().__init__(directory)
            if stream is None and os.path.lexists(self.base / self._name):
                self.close()
                raise UsageError(f"{file} exists", "remove it, or name another file")

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Have the body of the ``with`` call `end`, and keep the images if that fails.

        Raises:
            ArchiveFailed: the container has ended or may have, and podman's archive has not come.
            UsageError: the reader of the stream has gone; the container runs on.
        """
        if self._stream is not None:
            _check_reader(self._stream)
        with writable(self._file), (self.images.path / _PODMANS).open("xb") as self._archive:
            try:
                yield
            except BaseException as error:
                if not self._told or runs_on(error):
                    raise
                raise self._kept(error) from error

    def end(self, agent: Agent) -> bytes:
        """Have CRIU and podman end the dump, and take podman's archive."""
        self._told = True
        return agent.end_dump(self._append)

    def pack(self) -> bytes:
        """Write the archive; return the ``stats-dump`` of the guest's CRIU in it.

        Raises:
            ArchiveFailed: podman's archive is invalid, or this one cannot be written.
            UsageError, ImagesDamaged: the same, and the container runs on.
        """
        try:
            with BareArchive(self.images.path / _PODMANS) as podmans:
                with (
                    writable(self._shown),
                    self._opened() as file,
                    ImageSet.open(self.images.path) as images,
                ):
                    # The pages that were copied ahead are in a parent image set.
                    self._write(podmans.with_images(InsideImages(images).build()), file)
                return podmans.read(STATS_DUMP, _STATS_LIMIT)
        except BaseException as error:
            raise self._kept(error) from error

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        """Open what gets the archive; a file gets its name when all has been written."""
        if self._stream is not None:
            with os.fdopen(os.dup(self._stream), "wb") as file:
                yield file
            return
        finished = self.images.path / _FINISHED
        with finished.open("xb") as file:
            yield file
            finished.chmod(0o600)
            finished.rename(self.base / self._name)

    def _write(self, chunks: Iterator[bytes], file: IO[bytes]) -> None:
        if not self._pack:
            for chunk in chunks:
                file.write(chunk)
            return
        with (
            tempfile.TemporaryFile() as messages,
            subprocess.Popen(
                self._pack, stdin=subprocess.PIPE, stdout=file, stderr=messages
            ) as packer,
        ):  # fmt: skip
            assert packer.stdin is not None
            try:
                # It has failed if it does not read: its status tells.
                with suppress(BrokenPipeError):
                    for chunk in chunks:
                        packer.stdin.write(chunk)
                with suppress(BrokenPipeError):
                    packer.stdin.close()
            except BaseException:
                packer.kill()
                raise
            if status := packer.wait():
                if status == -signal.SIGPIPE:
                    raise _without_reader()
                messages.seek(0)
                said = messages.read(1 << 12).decode(errors="replace").strip().splitlines()
                raise UsageError(
                    f"{self._shown} cannot be written: {said[-1] if said else self._pack[0]}",
                    "free space there",
                )

    def _append(self, data: bytes) -> None:
        archive = self._archive
        assert archive is not None, "end() outside of committing()"
        where = os.fstatvfs(archive.fileno())
        spare = min(_SPARE, where.f_blocks * where.f_frsize // 10)
        if len(data) > where.f_bavail * where.f_frsize - spare:
            raise ImagesDamaged(f"{self._shown}: no space for podman's part", "free space there")
        archive.write(data)

    def _kept(self, error: BaseException) -> BaseException:
        """Keep what there is, unless the container runs on; return the error to be raised."""
        if self._left_running:
            return error
        podmans = str(self.images.path / _PODMANS)
        name = free_name(self.base, f"{self._name}.images")
        self.images.path.rename(self.base / name)
        kept = self._file.with_name(name)
        return ArchiveFailed(
            f"the container has ended, and its archive is incomplete: {_said(error, podmans)}",
            f"its images are in {kept}: see docs/podman.md, When an archive is incomplete",
        )


def _said(error: BaseException, podmans: str) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OvrError) or str(error):
        return str(error).replace(podmans, "podman's archive")
    return type(error).__name__


def _check_stream(stream: int) -> None:
    try:
        terminal = os.isatty(stream)
        for_writing = fcntl.fcntl(stream, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except OSError:
        terminal = for_writing = False
    if terminal:
        error = UsageError(
            "an archive cannot be written to a terminal",
            "name a file, or have another program read it: ovr dump … --export - | ssh …",
        )
        error.code = "terminal"
        raise error
    if not for_writing:
        error = UsageError("standard output is not open for writing", "name a file, or redirect it")
        error.code = "no-output"
        raise error


def _check_reader(stream: int) -> None:
    poll = select.poll()
    poll.register(stream, 0)
    if any(events & select.POLLERR for _, events in poll.poll(0)):  # pipe_poll() of fs/pipe.c
        raise _without_reader()


def _without_reader() -> UsageError:
    error = UsageError(
        "standard output cannot be written: the program that reads it has ended",
        "what does it say?",
    )
    error.code = "no-reader"
    return error


def _packer(file: Path) -> tuple[str, ...]:
    command = _PROGRAMS.get(file.suffix)
    if command is None:
        raise UsageError(
            f"{file}: an archive of what kind?", "name it FILE.tar, FILE.tar.zst or FILE.tar.gz"
        )
    if command and shutil.which(command[0]) is None:
        raise UsageError(
            f"{file}: {command[0]} is not installed here", f"apt-get install {command[0]}"
        )
    return command
