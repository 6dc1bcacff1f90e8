"""The cache of what is parsed once a kernel build: used, and damaged in every way."""

import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovr.kernel import Kernel, cache, processes
from ovr.kernel.cache import cache_directory, remembered

from ..machine import Machine
from .toy import ToyKernel

ID = "0123456789abcdef0123456789abcdef01234567"
SOURCE = (b"what the guest", b"holds")
TABLES = (np.frombuffer(b"_stext\ninit_task\n", np.uint8), np.array([0, 7], np.int32))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Maker:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return TABLES

    def get(self, source=SOURCE, build_id=ID, what="tables"):
        found = remembered(build_id, what, source, self)
        assert [table.dtype for table in found] == [table.dtype for table in TABLES]
        for one, two in zip(found, TABLES, strict=True):
            assert np.array_equal(one, two)
        return self.calls


@pytest.fixture
def maker(home):
    return Maker()


def test_made_once(maker):
    assert [maker.get() for _ in range(3)] == [1, 1, 1]
    assert [path.name for path in cache_directory().iterdir()] == [f"{ID}.tables"]
    assert cache_directory().stat().st_mode & 0o777 == 0o700


def test_another_source_under_the_same_build_id(maker):
    maker.get()
    assert maker.get(source=(b"what the guest", b"holdS")) == 2
    # pieces are not run together
    assert maker.get(source=(b"what the guesth", b"oldS")) == 3
    assert maker.get() == 4


@pytest.mark.parametrize("build_id", ["", "../../etc/passwd", "ab", "g" * 40, "A" * 40, "0" * 129])
def test_no_build_id_no_cache(maker, home, build_id):
    assert [maker.get(build_id=build_id) for _ in range(2)] == [1, 2]
    assert not home.exists()


def cached_file():
    return cache_directory() / f"{ID}.tables"


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damage_is_noticed_and_mended(maker, data):
    maker.get()
    path, before = cached_file(), maker.calls
    good = path.read_bytes()
    bad = bytearray(good)
    match data.draw(st.sampled_from(("cut", "change", "insert", "append"))):
        case "cut":
            del bad[data.draw(st.integers(0, len(bad) - 1)) :]
        case "change":
            at = data.draw(st.integers(0, len(bad) - 1))
            bad[at] ^= data.draw(st.integers(1, 255))
        case "insert":
            at = data.draw(st.integers(0, len(bad) - 1))
            bad[at:at] = b"\x55" * data.draw(st.integers(1, 40))
        case "append":
            bad += data.draw(st.binary(min_size=1, max_size=40))
    path.write_bytes(bad)
    assert maker.get() == before + 1
    assert path.read_bytes() == good


FORMS = st.sampled_from([b"|O", b"|V8", b"<i4", b"(9,9)i4", b"\xff"])
SIZES = st.integers(0, (1 << 64) - 1)
BODIES = st.builds(lambda f, n: f.ljust(8) + struct.pack("<Q", n) + b"123", FORMS, SIZES)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=st.binary(max_size=64) | BODIES)
def test_a_body_that_nobody_wrote_ends_in_no_other_error(home, body):
    path = cached_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest = cache._digest(SOURCE)
    path.write_bytes(cache.HEADER.pack(cache.MAGIC, digest, zlib.crc32(body), len(body)) + body)
    path.chmod(0o600)
    with cache.opened(create=False) as directory:
        cache._load(directory, path.name, digest)


def test_files_that_are_not_ours(maker, tmp_path):
    maker.get()
    path = cached_file()
    path.chmod(0o666)
    assert maker.get() == 2
    assert path.stat().st_mode & 0o777 == 0o600
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    assert maker.get() == 3
    assert not path.is_symlink()
    path.unlink()
    os.mkfifo(path)
    assert [maker.get(), maker.get()] == [4, 4]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_of_another_user(maker):
    maker.get()
    os.chown(cached_file(), 12345, 12345)
    assert maker.get() == 2


@pytest.fixture
def warnings(caplog):
    cache._warn.cache_clear()
    return caplog


def victims(directory):
    """Files that look old and many: what a cache would delete."""
    directory.mkdir(mode=0o700, parents=True)
    for number in range(cache.KEPT + 5):
        (directory / f"precious.{number}").write_text("mine")
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("level", ["home", "ovr", "kernel"])
def test_nothing_is_deleted_behind_another_users_link(maker, home, tmp_path, warnings, level):
    """The link is the cache directory, or leads to it."""
    victim = tmp_path / "victim"
    at = {"home": home, "ovr": home / "ovr", "kernel": home / "ovr" / "kernel"}[level]
    before = victims(victim / cache_directory().relative_to(at))
    at.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    at.symlink_to(victim)
    os.lchown(at, 12345, 12345)
    assert [maker.get(), maker.get()] == [1, 2]
    assert sorted(path.name for path in cache_directory().iterdir()) == before
    [said] = [record.message for record in warnings.records if record.levelname == "WARNING"]
    assert f"the link {at} belongs to user 12345: nothing is cached" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("level", ["home", "ovr", "kernel"])
def test_a_cache_in_another_users_directory_is_not_used(maker, home, warnings, level):
    before = victims(cache_directory())
    at = {"home": home, "ovr": home / "ovr", "kernel": cache_directory()}[level]
    os.chown(at, 12345, 12345)
    assert [maker.get(), maker.get()] == [1, 2]
    assert sorted(path.name for path in cache_directory().iterdir()) == before
    assert f"the directory {at} belongs to user 12345" in warnings.text


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_cache_that_others_can_write_to_is_not_used(maker, home, warnings, mode):
    before = victims(cache_directory())
    cache_directory().chmod(mode)
    assert [maker.get(), maker.get()] == [1, 2]
    assert sorted(path.name for path in cache_directory().iterdir()) == before
    assert f"others can write to the directory {cache_directory()}" in warnings.text


def test_a_link_of_ones_own_may_lead_to_the_cache(maker, home, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    home.symlink_to(elsewhere)
    assert [maker.get(), maker.get()] == [1, 1]
    assert list(elsewhere.rglob(f"{ID}.tables"))


def test_too_large(maker, monkeypatch):
    maker.get()
    monkeypatch.setattr(cache, "MAX_SIZE", 100)
    assert maker.get() == 2


def test_what_is_too_large_is_not_kept(maker, monkeypatch):
    monkeypatch.setattr(cache, "MAX_SIZE", 100)
    assert [maker.get(), maker.get()] == [1, 2]
    assert list(cache_directory().iterdir()) == []


def test_only_so_many_files_are_kept(maker, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 5)
    for number in range(9):
        maker.get(build_id=f"{number:040x}")
        os.utime(cache_directory() / f"{number:040x}.tables", (number, number))
    left = {path.name for path in cache_directory().iterdir()}
    assert left == {f"{number:040x}.tables" for number in range(4, 9)}


def test_a_place_that_cannot_be_written_to(maker, home):
    home.write_text("a file where the directory should be")
    assert [maker.get(), maker.get()] == [1, 2]


def test_no_home(maker, monkeypatch):
    def lost():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cache.Path, "home", lost)
    assert [maker.get(), maker.get()] == [1, 2]


def test_nothing_is_left_of_a_write_that_failed(maker, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.Directory, "rename", full)
    assert maker.get() == 1
    assert list(cache_directory().iterdir()) == []


def test_two_boots_of_a_kernel_share_what_does_not_move(home, tmp_path):
    written = []
    for base in (0xFFFF_FFFF_8100_0000, 0xFFFF_FFFF_9A00_0000):
        directory = tmp_path / f"{base:x}"
        directory.mkdir()
        toy = ToyKernel(Machine.build(directory), base=base)
        kernel = Kernel.find(toy.machine.ram)
        assert [process.comm for process in processes(kernel)] == ["init"]
        assert kernel.symbol("init_task") == base + 0x2000
        written.append({path.name: path.stat().st_ino for path in cache_directory().glob("*.*")})
    assert written[0] == written[1]
    assert sorted(written[0]) == [f"{ID}.btf", f"{ID}.kallsyms"]


def test_a_forged_build_id_spoils_nothing(home, tmp_path):
    for number, tk_data in enumerate((True, False, True)):
        directory = tmp_path / str(number)
        directory.mkdir()
        kernel = Kernel.find(ToyKernel(Machine.build(directory), tk_data=tk_data).machine.ram)
        assert ("struct tk_data" in kernel.types) is tk_data
        assert kernel.wall_clock() == 1_800_000_000
