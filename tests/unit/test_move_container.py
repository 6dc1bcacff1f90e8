"""A container on its move: its options, and its archive, which comes from another guest."""

import io
import json
import shutil
import tarfile

import pytest

from ovr.dump.container import Container
from ovr.dump.output import NewImages
from ovr.errors import ImagesDamaged, ImagesUnsupported, UsageError
from ovr.guest.protocol import ENGINE_ARCHIVE
from ovr.move import container as container_module
from ovr.move.container import checkpoint_options, moved_container, to_move

CONFIG = {"spec": {}, "id": "0123456789abcdef" * 4, "name": "web",
          "namedVolumes": [{"volumeName": "data"}]}  # fmt: skip


def archive(**members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in {
            "config.dump": json.dumps(CONFIG).encode(), "spec.dump": b"{}",
            "checkpoint/inventory.img": b"of no use", "checkpoint/descriptors.json": b"[]",
            "rootfs-diff.tar": b"changes", **members,
        }.items():  # fmt: skip
            if content is not None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


class Sending:
    """A commit whose source sends this."""

    def __init__(self, data):
        self.data = data

    def archive(self, save):
        for at in range(0, len(self.data), 1000):
            save(self.data[at : at + 1000])


@pytest.fixture
def images(dumps, tmp_path):
    for path in (dumps / "tree").glob("*.img"):
        shutil.copy(path, tmp_path)
    return NewImages(tmp_path)


def fetch(images, data, *options):
    return moved_container(Sending(data), Container("podman", "web", options), images)


def test_its_own_images_and_nothing_else_of_podmans(images):
    with fetch(images, archive()) as checkpoint:
        assert checkpoint.engine == "podman"
        assert checkpoint.volumes == ("data",)
        name = f"pagemap-{checkpoint.images.tasks[0].pid}.img"
        sent = b"".join(checkpoint.files({name: b"ours"})[ENGINE_ARCHIVE])
    with tarfile.open(fileobj=io.BytesIO(sent)) as tar:
        found = {name: tar.extractfile(name).read() for name in tar.getnames()}
    assert found.pop("config.dump") == json.dumps(CONFIG).encode()
    (ours,) = [name for name in found if name.endswith(".img")]
    assert found[ours] == b"ours"
    assert found["rootfs-diff.tar"] == b"changes"
    assert found["checkpoint/descriptors.json"] == b"[]"


def test_volumes_that_are_ignored(images):
    with fetch(images, archive(), "--ignore-volumes") as checkpoint:
        assert checkpoint.volumes == ()
        assert checkpoint.options == ("--ignore-volumes",)


@pytest.mark.parametrize("cut", [0, 100, 5000])
def test_an_archive_that_is_cut_off(images, cut):
    with pytest.raises(ImagesDamaged):
        fetch(images, archive()[:cut])


def test_an_archive_of_nothing(images):
    with pytest.raises(ImagesDamaged):
        fetch(images, archive(**{"config.dump": None}))


def test_an_archive_without_end(images, monkeypatch):
    monkeypatch.setattr(container_module, "MAX_IMAGE_BYTES", 2000)
    with pytest.raises(ImagesUnsupported):
        fetch(images, archive())


def test_images_of_another_guest_that_are_damaged(images):
    (images.path / "inventory.img").write_bytes(b"?")
    with pytest.raises(ImagesDamaged):
        fetch(images, archive())


def test_a_pid():
    assert to_move(4242, criu_options=["--shell-job"], engine_options=[]) == 4242
    with pytest.raises(UsageError):
        to_move(4242, criu_options=[], engine_options=["--ignore-volumes"])


def test_options_of_both_sides():
    found = to_move(
        "web", criu_options=["--file-locks"],
        engine_options=["--ignore-rootfs", "--publish=80:80", "--ignore-static-ip"],
    )  # fmt: skip
    assert isinstance(found, Container)
    assert (found.engine, found.name) == ("podman", "web")
    assert checkpoint_options(found) == ("--file-locks", "--ignore-rootfs")
    assert found.options == (
        "--file-locks", "--ignore-rootfs", "--publish=80:80", "--ignore-static-ip"
    )  # fmt: skip


@pytest.mark.parametrize("option", ["--export=/etc/passwd", "--leave-running", "--keep", "-l"])
def test_options_that_would_change_what_podman_does(option):
    with pytest.raises(UsageError) as caught:
        to_move("web", criu_options=[], engine_options=[option])
    assert option in str(caught.value)


def test_connections_of_a_container():
    with pytest.raises(UsageError) as caught:
        to_move("web", criu_options=["--tcp-established"], engine_options=[])
    assert caught.value.code == "container-tcp"


def test_a_name_that_no_container_has():
    with pytest.raises(UsageError):
        to_move("--all", criu_options=[], engine_options=[])
