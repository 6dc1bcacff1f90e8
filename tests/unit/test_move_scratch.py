"""The directory of a move's images goes, whatever happens to the process that made it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ovr.move import scratch
from ovr.move.scratch import scratch_directory, sweep

OWNER = """
import os, sys
from pathlib import Path
from ovr.move.scratch import scratch_directory
with scratch_directory(Path(sys.argv[1])) as path:
    (path / "pages-1.img").write_bytes(b"secret")
    print(path, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that has a directory, and its path."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("failing", [False, True])
def test_it_is_removed_at_the_end(tmp_path, failing):
    try:
        with scratch_directory(tmp_path) as path:
            assert path.stat().st_mode & 0o777 == 0o700
            (path / "core-1.img").write_bytes(b"")
            if failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert failing
    assert not [*tmp_path.iterdir()]


def test_one_of_a_killed_move_is_removed_by_the_next(tmp_path, owner):
    process, path = owner
    kill(process)
    assert (path / "pages-1.img").exists()
    with scratch_directory(tmp_path) as mine:
        assert [*tmp_path.iterdir()] == [mine]


def test_one_in_use_stays(tmp_path, owner):
    process, path = owner
    sweep(tmp_path)
    assert (path / "pages-1.img").exists()
    assert process.poll() is None


def test_what_is_not_ours_stays(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.mkdir(mode=0o700)
    (tmp_path / "ovr-move-link").symlink_to(precious)
    (tmp_path / "ovr-move-file").touch()
    (tmp_path / "ovr-move-open").mkdir(mode=0o755)
    (tmp_path / "another").mkdir(mode=0o700)
    before = {*tmp_path.iterdir()}
    sweep(tmp_path)
    assert {*tmp_path.iterdir()} == before
    (tmp_path / "ovr-move-theirs").mkdir(mode=0o700)
    monkeypatch.setattr(scratch.os, "geteuid", lambda: os.getuid() + 1)
    sweep(tmp_path)
    assert (tmp_path / "ovr-move-theirs").is_dir()


def test_one_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    real = scratch.tempfile.mkdtemp
    made = []

    def swept(**where):
        made.append(Path(real(**where)))
        if len(made) == 1:
            sweep(tmp_path)
        return str(made[-1])

    monkeypatch.setattr(scratch.tempfile, "mkdtemp", swept)
    with scratch_directory(tmp_path) as path:
        assert path == made[1]
        assert [*tmp_path.iterdir()] == [path]
