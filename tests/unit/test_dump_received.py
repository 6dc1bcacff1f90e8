"""Images from a hostile agent."""

import pytest

from ovr.dump.memory import dumped_pages
from ovr.dump.output import NewImages
from ovr.dump.received import Received
from ovr.errors import ImagesDamaged


@pytest.fixture
def images(tmp_path):
    return NewImages(tmp_path)


def test_pieces_are_joined(images, tmp_path):
    received = Received(images, 100)
    for name, data in (("inventory.img", b"one"), ("fs-1.img", b"x"), ("inventory.img", b"two")):
        received.save(name, data)
    for name in ("fs-1.img", "inventory.img"):
        received.save(name, b"")
    received.check_complete()
    assert (tmp_path / "inventory.img").read_bytes() == b"onetwo"
    assert received.names == ["fs-1.img", "inventory.img"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".hidden", "a/b", "x" * 300, "a\0b"])
def test_a_name_that_leads_elsewhere(images, tmp_path, name):
    with pytest.raises(ImagesDamaged, match="with the name"):
        Received(images, 100).save(name, b"data")
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_has_ended(images):
    received = Received(images, 100)
    received.save("fs-1.img", b"")
    with pytest.raises(ImagesDamaged, match=r"with the name 'fs-1\.img'"):
        received.save("fs-1.img", b"more")


def test_more_than_there_can_be(images):
    received = Received(images, 100)
    received.save("fs-1.img", b"x" * 60)
    with pytest.raises(ImagesDamaged, match="more than"):
        received.save("fs-2.img", b"x" * 41)


@pytest.mark.parametrize("missing", ["inventory.img", "its end"])
def test_images_that_are_not_all(images, missing):
    received = Received(images, 100)
    received.save("fs-1.img", b"")
    if missing == "its end":
        received.save("inventory.img", b"data")
    with pytest.raises(ImagesDamaged, match="not sent all"):
        received.check_complete()


def test_a_page_map_as_large_as_a_disk(images, tmp_path):
    """It is not read into memory."""
    with (tmp_path / "pagemap-1.img").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ImagesDamaged, match=r"pagemap-1\.img: more than"):
        dumped_pages(["pagemap-1.img"], images)


def test_a_file_of_the_runtimes_beside_the_images(images, tmp_path):
    for received in (Received(images, 100), Received(images, 100, also="other.json")):
        with pytest.raises(ImagesDamaged, match="with the name"):
            received.save("descriptors.json", b"[]")
    received = Received(images, 100, also="descriptors.json")
    for data in (b"[]", b""):
        received.save("descriptors.json", data)
    with pytest.raises(ImagesDamaged, match="with the name"):
        received.save("descriptors.json", b"again")
    assert (tmp_path / "descriptors.json").read_bytes() == b"[]"
