"""A disk that is full on the host: what is written beside a restore, and what is said of it."""

import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ovr.cli.criu_files import RESTORING, criu_files
from ovr.cli.logs import log_to_stderr
from ovr.errors import UsageError

FULL = Path("/dev/full")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="this machine has no /dev/full")


@pytest.fixture(autouse=True)
def logs():
    yield
    log_to_stderr(2)


def python(program: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False, **options
    )


PRINTED = """
from ovr.cli.output import printed
with printed("pid 7 is restored and runs"):
    print("x" * {size})
"""


@pytest.mark.parametrize("size", [1, 100_000])
def test_what_cannot_be_printed_is_no_failure(size):
    with FULL.open("w") as full:
        done = python(PRINTED.format(size=size), stdout=full)
    assert done.returncode == 0
    [line] = done.stderr.splitlines()
    assert line == (
        "ovr: pid 7 is restored and runs, but that cannot be printed: No space left on device"
    )


@pytest.mark.parametrize("words", [["states"], ["states", "--json"], ["--version"]])
def test_a_result_that_cannot_be_printed_is_one_line(words):
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ovr", *words], stdout=full, stderr=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
    assert done.returncode != 0
    if words != ["--version"]:  # argparse's own
        line = "ovr: standard output: No space left on device (free space there)\n"
        assert (done.returncode, done.stderr) == (1, line)


def test_an_error_that_cannot_be_printed_is_still_that_error():
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ovr", "ps", "--json", "--vm", "qmp:/nowhere"], stdout=full,
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 3
    first, second = done.stderr.splitlines()
    assert "/nowhere" in first
    assert "cannot be printed: No space left on device" in second


def test_a_log_that_cannot_be_written_is_told_once(tmp_path, capsys):
    (tmp_path / "log").symlink_to(FULL)
    with criu_files(tmp_path, RESTORING, log_file="log", level=4, pidfile=None):
        for _ in range(3):
            logging.getLogger("ovr.test").warning("something")
    said = capsys.readouterr().err
    assert said.count("No space left on device (free space there)") == 1
    assert "Traceback" not in said


def test_no_room_for_a_pidfile_is_told_before_anything_is_done(tmp_path):
    program = f"""
import resource, signal
from pathlib import Path
from ovr.cli.criu_files import RESTORING, criu_files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
with criu_files(Path({str(tmp_path)!r}), RESTORING, log_file=None, level=2, pidfile="pid"):
    print("the restore would begin")
"""
    done = python(program, stdout=subprocess.PIPE)
    assert "UsageError: the pidfile" in done.stderr
    assert "File too large" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "pid").exists()


def test_the_room_for_a_pid_is_kept_from_the_beginning(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert limit[1] == resource.RLIM_INFINITY
    with (
        pytest.raises(ZeroDivisionError),
        criu_files(tmp_path, RESTORING, log_file=None, level=2, pidfile="pid"),
    ):
        assert (tmp_path / "pid").read_text().split() == []
        assert (tmp_path / "pid").stat().st_size >= len(str(1 << 22))
        1 / 0  # noqa: B018
    assert not (tmp_path / "pid").exists()


def test_a_pidfile_that_exists_is_somebodys(tmp_path):
    (tmp_path / "pid").write_text("1")
    with (
        pytest.raises(UsageError, match="File exists"),
        criu_files(tmp_path, RESTORING, log_file=None, level=2, pidfile="pid"),
    ):
        os.abort()
    assert (tmp_path / "pid").read_text() == "1"
