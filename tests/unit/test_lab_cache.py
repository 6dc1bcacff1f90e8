"""Cache entries are whole or absent."""

import threading
import time

import pytest

from ovr.errors import LabError
from ovr.lab.cache import cache_directory, cached, digest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_built_once():
    built = []

    def build(work):
        built.append(work)
        (work / "file").write_text("content")

    for _ in range(2):
        assert (cached("thing", build) / "file").read_text() == "content"
    assert len(built) == 1
    assert cached("thing", build).parent == cache_directory()


def test_a_failed_build_leaves_nothing():
    def build(work):
        (work / "half").touch()
        raise LabError("no")

    with pytest.raises(LabError, match="no"):
        cached("thing", build)
    assert [path.name for path in cache_directory().iterdir()] == [".thing.lock"]


def test_a_dead_builder_is_cleaned_up_after():
    stale = cache_directory() / ".thing.tmp-abc"
    stale.mkdir()
    (stale / "half").touch()
    other = cache_directory() / ".thing2.tmp-abc"
    other.mkdir()
    cached("thing", lambda work: (work / "file").touch())
    assert not stale.exists()
    assert other.exists()


def test_racing_builders_build_once():
    built = []

    def build(work):
        built.append(work)
        time.sleep(0.1)

    threads = [threading.Thread(target=cached, args=("thing", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_digest_knows_where_ingredients_end():
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("a", b"b") == digest(b"a", "b")
    assert len({digest(), digest(""), digest("", "")}) == 3
