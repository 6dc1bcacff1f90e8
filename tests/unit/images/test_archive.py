"""Archives of containers: read in place, unpacked, and made again with other images."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import replace

import pytest

from ovr.checkpoint import (
    Archive,
    ImagesCheckpoint,
    PodmanCheckpoint,
    RuntimeCheckpoint,
    open_checkpoint,
)
from ovr.errors import CheckFailed, ImagesDamaged, ImagesUnsupported, UsageError
from ovr.guest.client.session import AgentInfo
from ovr.guest.protocol import ENGINE_ARCHIVE, HOOK_HELD
from ovr.images import ImageSet
from ovr.images.source import Sources
from ovr.plan import NO_POOL, build_inside, make_plan

CONFIG = {
    "id": "ab" * 32, "name": "web", "runtime": "crun", "rootfsImageName": "localhost/web:1",
    "spec": {}, "namedVolumes": [{"volumeName": "shelf", "dest": "/data"}],
}  # fmt: skip
EXTRAS = {
    "spec.dump": b"{}", "config.dump": json.dumps(CONFIG).encode(),
    "rootfs-diff.tar": b"\0" * 1024, "ctr.log": b"a line\n",
    "checkpoint/descriptors.json": b'["/dev/null","pipe:[1]","pipe:[2]"]',
}  # fmt: skip


def pack(path, files, *, links=()):
    """A tar with small files first, so that images begin at odd multiples of 512."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o640
            info.pax_headers = {"comment": "ü" * 50}
            tar.addfile(info, io.BytesIO(content))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


@pytest.fixture
def content(dumps):
    images = sorted((dumps / "tree").glob("*.img"))
    return EXTRAS | {f"checkpoint/{path.name}": path.read_bytes() for path in images}


@pytest.fixture
def archive(tmp_path, content):
    return pack(tmp_path / "web.tar", content)


def members(data):
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return {m.name: (m.mode, m.pax_headers, tar.extractfile(m).read()) for m in tar}


@pytest.mark.parametrize("packer", ["", "zstd", "gzip", "xz"])
def test_images_are_those_of_the_directory(dumps, archive, packer):
    if packer:
        if shutil.which(packer) is None:
            pytest.skip(f"needs {packer}")
        with archive.open("rb") as plain, archive.with_suffix(".packed").open("wb") as packed:
            subprocess.run([packer, "-c"], stdin=plain, stdout=packed, check=True)
        archive = archive.with_suffix(".packed")
    with (
        Archive.open(archive) as packed,
        ImageSet.open(dumps / "tree") as plain,
        Sources() as sources,
    ):
        assert packed.container.name == "web"
        assert packed.container.maker == "podman"
        assert packed.container.volumes == ("shelf",)
        assert packed.images.names == plain.names
        assert [packed.images.read(name) for name in plain.names] == [
            plain.read(name) for name in plain.names
        ]
        pairs = list(zip(packed.images.memories, plain.memories, strict=True))
        assert len(pairs) > 1
        for ours, theirs in pairs:
            assert bytes(sources.of(ours, 0).pages) == theirs.file().read(0, theirs.file().size)
        assert any(memory.file().base % 4096 for memory, _ in pairs)
        assert make_plan(packed.images).bytes_outside == make_plan(plain).bytes_outside > 0


def test_the_skeleton_has_other_images_and_nothing_else(archive, content):
    with PodmanCheckpoint.open(archive, name="new", options=["--tcp-established"]) as checkpoint:
        plan = make_plan(checkpoint.images)
        inside = build_inside(plan, NO_POOL).images
        (name, chunks), = checkpoint.files(inside).items()  # fmt: skip
        skeleton = b"".join(chunks)
        assert name == ENGINE_ARCHIVE
        assert checkpoint.options == ("--name", "new", "--tcp-established")
        assert len(skeleton) < archive.stat().st_size - plan.bytes_outside
        root = checkpoint.images.tasks[0].pid
    with archive.open("rb") as file:
        before = members(file.read())
    after = members(skeleton)
    assert {name: after[name] for name in EXTRAS} == {name: before[name] for name in EXTRAS}
    held = f"checkpoint/{HOOK_HELD}pagemap-{root}.img"
    assert held in after
    assert f"checkpoint/pagemap-{root}.img" not in after
    # From inside of a user namespace CRIU opens some of them as another user.
    modes = {after[name][0] for name in after if name.endswith(".img")}
    assert modes == {0o644}
    images = {name.removeprefix("checkpoint/").removeprefix(HOOK_HELD) for name in after}
    assert images - set(EXTRAS) - {"descriptors.json"} == set(inside)


def test_a_runtime_gets_its_images(archive, tmp_path, content):
    directory = tmp_path / "images"
    directory.mkdir()
    for name, data in content.items():
        if name.startswith("checkpoint/"):
            (directory / name.removeprefix("checkpoint/")).write_bytes(data)
    given = {"runtime": "runc", "bundle": "/srv/web", "name": "web"}
    for source in ({"images": directory}, {"archive": archive}):
        with open_checkpoint(**source, **given) as checkpoint:
            assert isinstance(checkpoint, RuntimeCheckpoint)
            assert (checkpoint.engine, checkpoint.container) == ("runc", "web")
            assert checkpoint.options == ("--bundle", "/srv/web", "web")
            files = checkpoint.files(build_inside(make_plan(checkpoint.images), NO_POOL).images)
            assert b"".join(files["descriptors.json"]) == EXTRAS["checkpoint/descriptors.json"]
            root = checkpoint.images.tasks[0].pid
            assert f"{HOOK_HELD}pagemap-{root}.img" in files
            assert f"pagemap-{root}.img" not in files


def test_what_the_guest_must_have(archive):
    hello = AgentInfo(
        protocol=3, agent="0", lab=False, kernel="6.12", criu="4.1.1", pid=1, page_size=4096,
        boot_id="", nonce=b"", force_write=True, secret_at=0, warm=0, warm_at=0,
        engines=("podman", "crun"),
    )  # fmt: skip
    with PodmanCheckpoint.open(archive) as checkpoint:
        checkpoint.check(hello)
        checkpoint.check(replace(hello, criu="3.19"))
        for other, match in (
            ({"criu": None}, "no CRIU"), ({"engines": ("runc",)}, "the guest has no podman"),
            ({"criu": "3.17.1"}, r"CRIU 3\.17\.1 runs no action scripts for podman"),
        ):  # fmt: skip
            with pytest.raises(CheckFailed, match=match) as caught:
                checkpoint.check(replace(hello, **other))
            assert caught.value.hint


def test_images_of_a_process_have_no_engine(dumps):
    with open_checkpoint(dumps / "tree", criu_options=["--shell-job"]) as checkpoint:
        assert isinstance(checkpoint, ImagesCheckpoint)
        assert (checkpoint.engine, checkpoint.options) == (None, ("--shell-job",))
        inside = build_inside(make_plan(checkpoint.images), NO_POOL).images
        assert set(checkpoint.files(inside)) == set(inside)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "either images or the archive"),
        ({"images": "x", "archive": "y"}, "either images or the archive"),
        ({"archive": "y", "runtime": "runc"}, "needs a bundle"),
        ({"archive": "y", "bundle": "/x", "name": "z"}, "needs a bundle"),
        ({"images": "x", "runtime": "runc", "bundle": "/x"}, "needs a bundle"),
        ({"archive": "y", "criu_options": ["--shell-job"]}, "podman runs CRIU itself"),
        ({"images": "x", "name": "z"}, "--name needs a container"),
        ({"images": "x", "engine_options": ["--keep"]}, "--keep needs a container"),
        ({"archive": "y", "engine_options": ["--import=z"]}, "cannot be passed on"),
        ({"archive": "y", "engine_options": ["--import-previous=z"]}, "cannot be passed on"),
        ({"archive": "y", "engine_options": ["--publish", "1:2"]}, "1:2 cannot be passed on"),
        ({"images": "x", "runtime": "kata", "bundle": "/x", "name": "z"}, "no container runtime"),
    ],
)
def test_what_does_not_belong_together(arguments, match):
    with pytest.raises(UsageError, match=match) as caught:
        open_checkpoint(**arguments)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["manifest.json", "layer.tar"], "a container image"),
        (["pre-checkpoint/inventory.img", "config.dump"], "a pre-checkpoint"),
        (["pod.options"], "a whole pod"),
        (["inventory.img", "core-1.img"], "bare CRIU images"),
        (["README"], "no checkpoint/"),
        (["checkpoint/inventory.img"], "without a container's configuration"),
    ],
)
def test_other_archives(tmp_path, names, match):
    path = pack(tmp_path / "x.tar", dict.fromkeys(names, b"{}"))
    with pytest.raises(ImagesUnsupported, match=match) as caught:
        Archive.open(path)
    assert caught.value.hint


def test_sparse_files(tmp_path):
    (tmp_path / "inventory.img").write_bytes(b"x")
    os.truncate(tmp_path / "inventory.img", 1 << 20)
    words = ["tar", "--sparse", "-C", tmp_path, "-cf", tmp_path / "x.tar", "inventory.img"]
    subprocess.run(words, check=True)
    with pytest.raises(ImagesUnsupported, match="sparse file"):
        Archive.open(tmp_path / "x.tar")


def test_links_are_no_images(tmp_path, content):
    links = [("checkpoint/fs-4000.img", "/etc/shadow")]
    path = pack(tmp_path / "x.tar", content, links=links)
    with pytest.raises(ImagesUnsupported, match="not a regular file"):
        Archive.open(path)


def test_podman_cannot_restore_what_crio_wrote(tmp_path, content):
    config = {key: value for key, value in CONFIG.items() if key != "spec"}
    path = pack(tmp_path / "x.tar", content | {"config.dump": json.dumps(config).encode()})
    with pytest.raises(ImagesUnsupported, match="written by CRI-O"):
        PodmanCheckpoint.open(path)


@pytest.mark.parametrize("bad", [b"", b"[]", b"{", b"\xff" * 20])
def test_configuration_that_is_none(tmp_path, content, bad):
    path = pack(tmp_path / "x.tar", content | {"config.dump": bad})
    with pytest.raises(ImagesDamaged, match=r"config\.dump"):
        Archive.open(path)


def test_damaged_archives(tmp_path, archive, content):
    whole = archive.read_bytes()
    for size in (*range(513, len(whole), len(whole) // 20), 0, 100, 512):
        archive.write_bytes(whole[:size])
        with pytest.raises((ImagesDamaged, ImagesUnsupported, UsageError)):
            Archive.open(archive)
    double = tmp_path / "double.tar"
    with tarfile.open(double, "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("checkpoint/inventory.img"))
    with pytest.raises(ImagesDamaged, match="twice"):
        Archive.open(double)


def test_what_cannot_be_unpacked(tmp_path, archive, monkeypatch):
    with archive.open("rb") as plain, (tmp_path / "x.gz").open("wb") as packed:
        subprocess.run(["gzip", "-c"], stdin=plain, stdout=packed, check=True)
    data = (tmp_path / "x.gz").read_bytes()
    (tmp_path / "cut.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImagesDamaged, match="cannot be unpacked: gzip"):
        Archive.open(tmp_path / "cut.gz")
    with (tmp_path / "text.gz").open("wb") as packed:
        subprocess.run(["gzip", "-c"], input=b"x" * 9999, stdout=packed, check=True)
    with pytest.raises(UsageError, match="no tar archive inside"):
        Archive.open(tmp_path / "text.gz")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="packed with gzip, which is not installed") as caught:
        Archive.open(tmp_path / "x.gz")
    assert caught.value.hint == "apt-get install gzip"


def test_what_is_no_archive(tmp_path):
    (tmp_path / "text").write_text("hello")
    for path, match in (
        (tmp_path, "a directory"), (tmp_path / "none", "cannot be opened"),
        (tmp_path / "text", "not a tar archive"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=match) as caught:
            Archive.open(path)
        assert caught.value.hint
