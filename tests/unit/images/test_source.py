"""Pages images that somebody changes while they are restored."""

import os
import shutil

import pytest

from ovr.errors import ImagesDamaged
from ovr.images import ImageSet
from ovr.images.source import Sources, readable


@pytest.fixture
def images(dumps, tmp_path):
    shutil.copytree(dumps / "uts", tmp_path / "images")
    with ImageSet.open(tmp_path / "images") as images:
        yield images


@pytest.fixture
def memory(images):
    return images.tasks[0].memory


@pytest.fixture
def pages(images, memory):
    return images.path / memory.pages_name


def test_unchanged(memory):
    with Sources() as sources:
        sources.check_unchanged()
        assert sources.of(memory, 0) is sources.of(memory, 0)
        sources.check_unchanged()


def test_written_to(memory, pages):
    with Sources() as sources:
        sources.of(memory, 0)
        with pages.open("r+b") as file:
            file.write(b"other")
        with pytest.raises(ImagesDamaged, match=f"{pages.name}: changed while") as caught:
            sources.check_unchanged()
    assert "copy the images" in caught.value.hint


def test_replaced(memory, pages):
    with Sources() as sources:
        sources.of(memory, 0)
        status = pages.stat()
        fresh = pages.with_name("fresh")
        shutil.copyfile(pages, fresh)
        os.utime(fresh, ns=(status.st_atime_ns, status.st_mtime_ns))
        fresh.rename(pages)
        with pytest.raises(ImagesDamaged, match="changed while"):
            sources.check_unchanged()


def test_cut_off(memory, pages):
    with Sources() as sources:
        sources.of(memory, 0)
        os.truncate(pages, 4096)
        with pytest.raises(ImagesDamaged, match="shrank"):
            sources.check_unchanged()


def test_reading_ahead_of_what_was_cut_off(memory, pages):
    with Sources() as sources:
        source = sources.of(memory, 0)
        source.read_ahead(0, source.size)
        os.truncate(pages, 4096)
        source.read_ahead(0, 4096)
        with pytest.raises(ImagesDamaged, match=f"{pages.name}: cannot be read: it was cut off"):
            source.read_ahead(0, source.size)


def test_what_the_native_loops_find():
    with pytest.raises(ImagesDamaged, match="pages: cannot be read: no end"), readable("pages"):
        raise OSError(5, "no end")
