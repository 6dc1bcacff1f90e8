"""Pages images that somebody changes while they are restored."""

import os
import shutil

import pytest

from ovr._fastcopy import in_page_cache
from ovr.errors import ImagesDamaged, ImagesUnreachable
from ovr.images import ImageSet
from ovr.images.source import Source, Sources, readable


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


def test_only_what_the_page_cache_lacks_is_read(tmp_path, monkeypatch):
    """Where memory is short some pages of an image are gone, here and there."""
    path, size, gone = tmp_path / "pages", 8 << 20, 5 << 20
    path.write_bytes(os.urandom(size))
    _keep_all_but(path, gone, 64 << 10)
    read = []
    preadv = os.preadv

    def count(fd, buffers, offset):
        read.append((offset, preadv(fd, buffers, offset)))
        return read[-1][1]

    monkeypatch.setattr(os, "preadv", count)
    with path.open("rb") as file:
        source = Source("pages", memoryview(b""), file.fileno(), 0)
        source.read_ahead(4096, size)
        assert in_page_cache(file.fileno(), 0, size)
        assert any(at <= gone < at + got for at, got in read)
        assert sum(got for _, got in read) <= 512 << 10
        read.clear()
        source.read_ahead(0, size)
        assert not read


def _keep_all_but(path, start, size):
    # In the page cache.
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(fd, start, 0)
        os.pread(fd, path.stat().st_size - start - size, start + size)
        if in_page_cache(fd, start, size):
            pytest.skip("this file system forgets nothing")


def test_what_the_native_loops_find():
    with pytest.raises(ImagesUnreachable, match="pages: cannot be read: no end"), readable("pages"):
        raise OSError(5, "no end")
