"""Packed images are refused by the name of what they are packed with."""

import bz2
import gzip
import lzma
import tarfile
from pathlib import Path

import pytest

from ovr.errors import ImagesUnsupported, UsageError
from ovr.images import ImageSet

ZSTD = b"\x28\xb5\x2f\xfd" + bytes(40)
LZ4 = b"\x04\x22\x4d\x18" + bytes(40)
PACKERS = {
    "zstd": lambda data: ZSTD,
    "lz4": lambda data: LZ4,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}


def opened(path: Path):
    with ImageSet.open(path) as images:
        return images.tasks


def test_an_archive_instead_of_a_directory(one, tmp_path):
    archive = tmp_path / "checkpoint.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(one, "images")
    for name, pack in {"tar": bytes, **PACKERS}.items():
        packed = tmp_path / f"packed.{name}"
        packed.write_bytes(pack(archive.read_bytes()))
        with pytest.raises(ImagesUnsupported, match=f"packed.{name}: packed with {name}"):
            opened(packed)
    directory = tmp_path / "only"
    directory.mkdir()
    archive.rename(directory / "checkpoint.tar")
    with pytest.raises(ImagesUnsupported, match=r"checkpoint.tar: packed with tar"):
        opened(directory)


def test_a_stream(tmp_path):
    stream = tmp_path / "stream"
    stream.write_bytes(b"\x12\x34" * 99)
    with pytest.raises(UsageError, match="no directory of images") as caught:
        opened(stream)
    assert "criu-image-streamer" in caught.value.hint


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", ["core", "pages", "inventory"])
def test_packed_one_by_one(one, packer, kind):
    path = max(one.glob(f"{kind}*.img"), key=lambda image: image.stat().st_size)
    path.write_bytes(PACKERS[packer](path.read_bytes()))
    with pytest.raises(ImagesUnsupported, match=f"{path.name}: packed with {packer}"):
        opened(one)
