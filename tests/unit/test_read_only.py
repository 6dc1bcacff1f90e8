"""Places on the host where nothing can be written: what is said of it, and what to do."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ovr.checkpoint import Archive
from ovr.cli.criu_files import RESTORING, criu_files
from ovr.cli.logs import log_to_stderr
from ovr.errors import UsageError
from ovr.images.stats import restore_stats
from tests.unit.images.test_archive import EXTRAS, pack

IN_A_NAMESPACE = ("unshare", "--map-root-user", "--mount")
READ_ONLY = 'mount -t tmpfs -o ro none "$0" && exec "$@"'


@pytest.fixture(autouse=True)
def logs():
    yield
    log_to_stderr(2)


@pytest.fixture
def closed(tmp_path):
    """Run `ovr` where one directory is a file system that is mounted read-only."""
    place = tmp_path / "closed"
    place.mkdir()
    if subprocess.run([*IN_A_NAMESPACE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here")

    def ovr(*words, **environment):
        command = [*IN_A_NAMESPACE, "sh", "-c", READ_ONLY, place]
        command += ["env", *(f"{name}={value}" for name, value in environment.items())]
        done = subprocess.run(
            [*command, sys.executable, "-m", "ovr", *words], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    return place, ovr


@pytest.mark.parametrize("words", [["-o", "log"], ["--pidfile", "pid"]])
def test_images_on_a_read_only_file_system(closed, words):
    place, ovr = closed
    code, said = ovr("restore", "-D", place, "--vm", "qmp:/nowhere", *words)
    assert code == 2
    assert f"{place}/{words[1]} cannot be made: Read-only file system (" in said
    assert "name a work directory with -W DIR" in said
    code, said = ovr("restore", "-D", place, "--vm", "qmp:/nowhere", "-W", place.parent, *words)
    assert code == 3  # there is no VM: the files were made


def test_a_report_and_an_agent(closed):
    place, ovr = closed
    code, said = ovr("restore", "--vm", "qmp:/nowhere", "--report", place / "x.html")
    assert code == 2
    assert "Read-only file system (nothing can be written there: name another path" in said
    code, said = ovr("agent", "build", "-o", place / "ovr-agent")
    assert code == 1
    assert "Read-only file system (nothing can be written there: name another path" in said


def test_a_packed_archive_has_nowhere_to_go(closed, tmp_path):
    place, ovr = closed
    archive = pack(tmp_path / "x.tar", EXTRAS)
    subprocess.run(["gzip", archive], check=True)
    code, said = ovr("plan", "--archive", f"{archive}.gz", TMPDIR=place)
    assert code == 2
    assert f"cannot be unpacked to {place}: Read-only file system" in said
    assert "set TMPDIR" in said


@pytest.mark.parametrize(("where", "cure"), [("/nowhere", "create its"), ("/dev/null", "set TMP")])
def test_no_directory_to_unpack_to(tmp_path, monkeypatch, where, cure):
    archive = pack(tmp_path / "x.tar", EXTRAS)
    subprocess.run(["gzip", archive], check=True)
    monkeypatch.setenv("TMPDIR", where)
    with pytest.raises(UsageError, match=f"cannot be unpacked to {where}") as caught:
        Archive.open(Path(f"{archive}.gz"))
    assert caught.value.hint.startswith(cure)


@pytest.mark.parametrize("kind", ["log_file", "pidfile"])
@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("none/file", "create its directory, or"),
        ("plain/file", "name a work"),
    ],
)
def test_files_that_cannot_be_made(tmp_path, kind, name, cure):
    (tmp_path / "plain").touch()
    names = {"log_file": None, "pidfile": None, kind: name}
    with (
        pytest.raises(UsageError, match="cannot be made") as caught,
        criu_files(tmp_path, RESTORING, level=2, **names),
    ):
        raise AssertionError
    assert caught.value.hint.startswith(cure)
    assert "-W DIR" in caught.value.hint


def test_a_pidfile_that_exists(tmp_path):
    (tmp_path / "pid").write_text("1")
    with (
        pytest.raises(UsageError, match="File exists") as caught,
        criu_files(tmp_path, RESTORING, log_file=None, level=2, pidfile="pid"),
    ):
        raise AssertionError
    assert "remove it" in caught.value.hint


def test_no_stats_are_no_failure(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "ovr.restore")
    with criu_files(tmp_path / "gone", RESTORING, log_file=None, level=2) as finish:
        finish(restore_stats(pages=0, forking=0, total=0), 1)
    [record] = caplog.records
    assert "no stats-restore in" in record.getMessage()
    assert "-W DIR" in record.getMessage()
