"""The archive of a dumped container: podman's files, and the images from the host."""

import io
import json
import os
import shutil
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ovr.checkpoint import Archive
from ovr.dump import export
from ovr.dump.export import Export
from ovr.errors import (
    AgentUnreachable,
    ArchiveFailed,
    AttemptFailed,
    CheckFailed,
    TreeDamaged,
    UsageError,
)
from ovr.images import ImageSet

CONFIG = {"id": "ab" * 32, "name": "web", "runtime": "crun", "rootfsImageName": "x", "spec": {}}
PODMANS = {
    "config.dump": json.dumps(CONFIG).encode(), "spec.dump": b"{}", "rootfs-diff.tar": b"\0" * 1024,
    "stats-dump": b"statistics", "checkpoint/descriptors.json": b"[]",
    "checkpoint/core-1.img": b"podman's", "checkpoint/pages-9.img": b"lacks memory",
}  # fmt: skip
MEMORY = {"checkpoint/core-1.img", "checkpoint/pages-9.img", "checkpoint/parent"}


def tar_of(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        link = tarfile.TarInfo("checkpoint/parent")
        link.type, link.linkname = tarfile.SYMTYPE, "/run/ovr/restore-0/images"
        tar.addfile(link)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.pax_headers = len(content), 0o640, {"comment": "ü"}
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


class Agent:
    """Ends dumps: sends an archive, then what is told, or fails."""

    def __init__(self, archive: bytes, error: BaseException | None = None) -> None:
        self._archive, self._error = archive, error

    def end_dump(self, save: Any) -> bytes:
        for at in range(0, len(self._archive), 1000):
            save(self._archive[at : at + 1000])
        if self._error:
            raise self._error
        return b""


@pytest.fixture
def images(dumps: Path) -> Path:
    return dumps / "tree"


def finish(output: Export, images: Path, agent: Agent) -> bytes:
    for path in images.glob("*.img"):
        output.images.write(path.name, path.read_bytes())
    output.images.write("descriptors.json", b"the agent's")
    with output.committing():
        output.end(agent)  # type: ignore[arg-type]
    return output.pack()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("name", ["web.tar", "web.tar.zst", "web.tar.gz", "web.tgz"])
def test_the_archive(tmp_path: Path, images: Path, name: str) -> None:
    file = tmp_path / name
    with Export(file, left_running=False) as output:
        assert finish(output, images, Agent(tar_of(PODMANS))) == b"statistics"
    assert names(tmp_path) == {name}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with Archive.open(file) as archive, ImageSet.open(images) as wanted:
        assert archive.container.id == CONFIG["id"]
        found = {image: archive.images.read(image) for image in archive.images.names}
        assert found == {image: wanted.read(image) for image in wanted.names}
        members = archive._own.members
        for member in {*PODMANS} - MEMORY:
            assert archive._own.read(member) == PODMANS[member]
        assert not MEMORY - {"checkpoint/core-1.img"} & {*members}


def test_podmans_members_are_byte_for_byte(tmp_path: Path, images: Path) -> None:
    file = tmp_path / "web.tar"
    kept = {name: data for name, data in PODMANS.items() if name not in MEMORY}
    with Export(file, left_running=False) as output:
        finish(output, images, Agent(tar_of(PODMANS)))
    whole = tar_of(kept)
    first = whole.index(b"config.dump") - 1024  # its extension header comes before it
    end = len(whole.rstrip(b"\0")) // 512 * 512
    assert whole[first:end] in file.read_bytes()


def test_pages_copied_ahead_are_in_it(tmp_path: Path, dumps: Path) -> None:
    """It builds on no other images."""
    chain = dumps / "parent"
    file = tmp_path / "web.tar"
    with Export(file, left_running=False) as output:
        parent = output.next_parent()
        for path in (chain / "parent").resolve().glob("*.img"):
            parent.write(path.name, path.read_bytes())
        finish(output, chain, Agent(tar_of(PODMANS)))
    with Archive.open(file) as archive, ImageSet.open(chain) as wanted:
        assert len(archive.images.levels) == 1
        for ours, theirs in zip(archive.images.memories, wanted.memories, strict=True):
            assert ours.entries["size"].sum() == theirs.entries["size"].sum()
            assert not ours.entries["level"].any()


@pytest.mark.parametrize("name", ["web", "web.tar.xz", "web.zip"])
def test_archives_of_another_kind(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="of what kind"):
        Export(tmp_path / name, left_running=False)
    assert not names(tmp_path)


def test_a_packer_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="zstd is not installed"):
        Export(tmp_path / "web.tar.zst", left_running=False)


def test_a_file_that_exists(tmp_path: Path) -> None:
    (tmp_path / "web.tar").touch()
    with pytest.raises(UsageError, match="exists"):
        Export(tmp_path / "web.tar", left_running=False)
    assert names(tmp_path) == {"web.tar"}


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        Export(tmp_path / "no" / "web.tar", left_running=False)


@pytest.mark.parametrize("error", [AttemptFailed("aborted"), CheckFailed("migrated")])
def test_nothing_stays_if_the_container_runs_on(tmp_path: Path, error: Exception) -> None:
    file = tmp_path / "web.tar"
    with pytest.raises(type(error)), Export(file, left_running=False) as output:
        output.images.write("core-1.img", b"data")
        with output.committing():
            if isinstance(error, CheckFailed):
                raise error  # before podman was told
            output.end(Agent(b"", error))  # type: ignore[arg-type]
    assert not names(tmp_path)


@pytest.mark.parametrize(
    "agent",
    [
        Agent(tar_of(PODMANS)[:5000], AgentUnreachable("the link broke")),
        Agent(tar_of(PODMANS)[:5000]),
        Agent(b""),
        Agent(tar_of({name: PODMANS[name] for name in ("spec.dump", "rootfs-diff.tar")})),
        Agent(b"\0" * 1024),
        Agent(b"not a tar" * 1000),
        Agent(tar_of(PODMANS), KeyboardInterrupt()),
        Agent(tar_of(PODMANS), ArchiveFailed("podman failed")),
        Agent(b"", TreeDamaged("CRIU was killed")),
    ],
    ids=[
        "link",
        "cut",
        "nothing",
        "incomplete",
        "empty",
        "no tar",
        "interrupted",
        "podman",
        "criu",
    ],
)
def test_images_stay_if_the_container_has_ended(tmp_path: Path, images: Path, agent: Agent) -> None:
    for number in range(2):
        with (
            pytest.raises(ArchiveFailed, match="has ended, and its archive") as caught,
            Export(tmp_path / "web.tar", left_running=False) as output,
        ):
            finish(output, images, agent)
        kept = tmp_path / ("web.tar.images" if number == 0 else "web.tar.images.1")
        assert f"{kept}:" in caught.value.hint
        assert caught.value.exit_code == 8
        with ImageSet.open(kept) as found, ImageSet.open(images) as wanted:
            assert found.names == wanted.names
    assert names(tmp_path) == {"web.tar.images", "web.tar.images.1"}


def test_a_packer_that_fails(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "zstd"
    program.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    place = tmp_path / "place"
    place.mkdir()
    with (
        pytest.raises(ArchiveFailed, match="no space left"),
        Export(place / "web.tar.zst", left_running=False) as output,
    ):
        finish(output, images, Agent(tar_of(PODMANS)))
    assert names(place) == {"web.tar.zst.images"}


def test_a_failure_while_the_container_runs_on(tmp_path: Path, images: Path) -> None:
    file = tmp_path / "web.tar"
    with pytest.raises(UsageError, match="not a tar"), Export(file, left_running=True) as output:
        finish(output, images, Agent(b"no tar" * 1000))
    assert not names(tmp_path)


def test_a_guest_cannot_fill_the_disk(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(export, "_SPARE", free * 2)
    monkeypatch.setattr(
        os, "fstatvfs", lambda _: os.statvfs_result((1, 1, free * 20, 0, 500, *[0] * 5))
    )
    with (
        pytest.raises(ArchiveFailed, match="no space for podman's part"),
        Export(tmp_path / "web.tar", left_running=False) as output,
    ):
        finish(output, images, Agent(tar_of(PODMANS)))


def test_to_a_stream(tmp_path: Path, images: Path) -> None:
    file = tmp_path / "web.tar.zst"
    directory = tmp_path / "place"
    directory.mkdir()
    with (
        file.open("wb") as stream,
        Export(directory / file.name, left_running=False, stream=stream.fileno()) as output,
    ):
        finish(output, images, Agent(tar_of(PODMANS)))
    assert not names(directory)
    with Archive.open(file) as archive, ImageSet.open(images) as wanted:
        assert archive.container.id == CONFIG["id"]
        found = {image: archive.images.read(image) for image in archive.images.names}
        assert found == {image: wanted.read(image) for image in wanted.names}


def test_a_file_of_that_name_is_no_matter_for_a_stream(tmp_path: Path) -> None:
    (tmp_path / "web.tar.zst").touch()
    reader, writer = os.pipe()
    with Export(tmp_path / "web.tar.zst", left_running=False, stream=writer):
        pass
    assert names(tmp_path) == {"web.tar.zst"}
    os.close(reader)
    os.close(writer)


def test_a_terminal_is_refused(tmp_path: Path) -> None:
    leader, follower = os.openpty()
    with pytest.raises(UsageError) as caught:
        Export(tmp_path / "web.tar.zst", left_running=False, stream=follower)
    assert caught.value.code == "terminal"
    os.close(leader)
    os.close(follower)
    with pytest.raises(UsageError) as caught:
        Export(tmp_path / "web.tar.zst", left_running=False, stream=follower)
    assert caught.value.code == "no-output"
    assert not names(tmp_path)


def test_a_reader_that_has_gone_before_the_end(tmp_path: Path) -> None:
    """The container runs on."""
    reader, writer = os.pipe()
    os.close(reader)
    with (
        pytest.raises(UsageError) as caught,
        Export(tmp_path / "web.tar.zst", left_running=False, stream=writer) as output,
        output.committing(),
    ):
        raise AssertionError("podman was told")
    assert caught.value.code == "no-reader"
    assert not names(tmp_path)
    os.close(writer)


@pytest.mark.parametrize("left_running", [False, True])
def test_a_reader_that_goes_away(tmp_path: Path, images: Path, left_running: bool) -> None:
    """The images stay, unless the container runs on."""
    reader, writer = os.pipe()

    class Last(Agent):
        def end_dump(self, save: Any) -> bytes:
            os.close(reader)
            return super().end_dump(save)

    expected = UsageError if left_running else ArchiveFailed
    with (
        pytest.raises(expected, match="has ended") as caught,
        Export(tmp_path / "web.tar.zst", left_running=left_running, stream=writer) as output,
    ):
        finish(output, images, Last(tar_of(PODMANS)))
    assert caught.value.code == ("no-reader" if left_running else "archive")
    assert names(tmp_path) == (set() if left_running else {"web.tar.zst.images"})
    os.close(writer)
