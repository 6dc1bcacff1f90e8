"""Packed archives of an enemy: a few bytes that would be very many, and programs that go on."""

import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import psutil
import pytest

from ovr.checkpoint import Archive
from ovr.errors import ImagesDamaged, ImagesUnsupported, UsageError
from tests.unit.images.tars import END, container, head

G = 1 << 30
PACKERS = ("zstd", "gzip", "xz", "lz4", "bzip2")


def pack(path: Path, *parts: bytes | int, packer: str = "zstd") -> Path:
    """Pack bytes and, where a number stands, that many zeros."""
    if shutil.which(packer) is None:
        pytest.skip(f"needs {packer}")
    level = {"xz": "-0"}.get(packer, "-1")
    with (
        path.open("wb") as file,
        subprocess.Popen(
            [packer, "-c", level], stdin=subprocess.PIPE, stdout=file, stderr=subprocess.DEVNULL
        ) as process,
    ):
        for part in parts:
            if isinstance(part, bytes):
                process.stdin.write(part)
                continue
            for at in range(0, part, 1 << 20):
                process.stdin.write(bytes(min(1 << 20, part - at)))
    return path


@pytest.fixture
def small(monkeypatch):
    """A file system of 32 MiB to unpack to; gives a function: least that was free in it."""
    where = Path(tempfile.mkdtemp(prefix="ovr-test-"))
    command = ["mount", "-t", "tmpfs", "-o", "size=32M", "ovr-test", where]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        where.rmdir()
        pytest.skip("cannot mount a file system here")
    monkeypatch.setenv("TMPDIR", str(where))
    ended, least = threading.Event(), [32 << 20]

    def watch():
        while not ended.wait(0.001):
            found = os.statvfs(where)
            least.append(min(least.pop(), found.f_bavail * found.f_frsize))

    thread = threading.Thread(target=watch)
    thread.start()
    yield lambda: least[0]
    ended.set()
    thread.join()
    assert list(where.iterdir()) == []
    subprocess.run(["umount", where], check=True)
    where.rmdir()


@pytest.mark.parametrize("packer", PACKERS)
def test_a_bomb_leaves_room_for_others(tmp_path, small, packer):
    """Its header says how much is to come, and there is no room for it."""
    size = 64 << 20
    path = pack(tmp_path / "x", head("checkpoint/pages-1.img", size), size, END, packer=packer)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UsageError, match="no space to unpack it") as caught:
        Archive.open(path)
    assert "TMPDIR" in caught.value.hint
    assert small() > 30 << 20  # nothing of it was written


def test_a_bomb_of_many_members(tmp_path, small):
    parts = []
    for number in range(32):
        parts += [head(f"checkpoint/pages-{number}.img", 2 << 20), 2 << 20]
    with pytest.raises(UsageError, match="no space to unpack it"):
        Archive.open(pack(tmp_path / "x", *parts, END))
    assert 1 << 20 < small() < 10 << 20  # a tenth is left, but for the last member's size


def test_what_is_no_tar_is_not_unpacked(tmp_path, small):
    with pytest.raises(UsageError, match="no tar archive inside"):
        Archive.open(pack(tmp_path / "x", 64 << 20))
    assert small() > 30 << 20


def test_what_follows_the_end_is_not_unpacked(tmp_path, small):
    with pytest.raises(ImagesDamaged, match="more data after the end of the tar"):
        Archive.open(pack(tmp_path / "x", container(), END, 64 << 20))
    assert small() > 30 << 20


def test_more_than_this_host_has_memory_for(tmp_path):
    """It would be memory of a VM of this host: said before a byte of it is unpacked."""
    size = psutil.virtual_memory().total + psutil.swap_memory().total + 2 * G
    field = b"\x80" + size.to_bytes(11, "big")
    path = pack(tmp_path / "x", head("checkpoint/pages-1.img", field=field), 1 << 20)
    with pytest.raises(ImagesUnsupported, match="fit into this host's memory") as caught:
        Archive.open(path)
    assert "a plain archive" in caught.value.hint


def test_padding_after_the_end(tmp_path):
    """GNU tar fills its records; with --blocking-factor up to 1 MiB."""
    path = pack(tmp_path / "x", container(), END, (1 << 20) - 4096)
    with pytest.raises(ImagesUnsupported, match="image magic"):  # read to its end
        Archive.open(path)


@pytest.mark.parametrize("packer", PACKERS)
def test_the_unpacker_is_believed_first(tmp_path, packer):
    """Where its input is cut off, the tar is, too; but the unpacker says why."""
    path = pack(tmp_path / "x", container(os.urandom(0)), head("a", 1 << 20), os.urandom(1 << 20),
                END, packer=packer)  # fmt: skip
    data = path.read_bytes()
    for size in (len(data) // 2, len(data) - 3):
        path.write_bytes(data[:size])
        with pytest.raises(ImagesDamaged, match="cannot be unpacked"):
            Archive.open(path)


def test_a_window_of_gigabytes(tmp_path):
    """xz takes as much memory for its dictionary as the file says."""
    if shutil.which("xz") is None:
        pytest.skip("needs xz")
    path = tmp_path / "x"
    words = ["xz", "-c", "--lzma2=preset=0,dict=768MiB"]
    with path.open("wb") as packed:
        done = subprocess.run(words, input=container() + END, stdout=packed, check=False)
    if done.returncode:
        pytest.skip("too little memory to pack it")
    with pytest.raises(ImagesDamaged, match="limit is 512 MiB"):
        Archive.open(path)


def open_and_running():
    return psutil.Process().num_fds(), psutil.Process().children()


def test_nothing_stays_open_or_running(tmp_path):
    path = pack(tmp_path / "x", head("checkpoint/pages-1.img", 1 << 50))
    before = open_and_running()
    for _ in range(5):
        with pytest.raises((UsageError, ImagesUnsupported)):
            Archive.open(path)
    assert open_and_running() == before


def test_a_fifo_is_no_archive(tmp_path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(UsageError, match="not a tar archive"):
        Archive.open(tmp_path / "x")
