"""Files that `ovr` writes: which path is followed where, and what another user can redirect."""

import errno
import grp
import logging
import os
import pwd
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ovr.cli.criu_files import RESTORING, criu_files
from ovr.cli.logs import log_to_stderr
from ovr.cli.picture import picture_file
from ovr.errors import LabError, UsageError
from ovr.guest import build
from ovr.guest.compiler import deliver
from ovr.host import Directory, UntrustedPath, locate
from ovr.images.framing import write_image
from ovr.images.stats import restore_stats
from ovr.lab.cache import cached

OTHER = 12345
SECRET = "root:x:0:0"

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(autouse=True)
def logs():
    yield
    log_to_stderr(2)


@pytest.fixture
def victim(tmp_path) -> Path:
    """A file of ours that another user may not write to, and would like to."""
    path = tmp_path / "victim"
    path.write_text(SECRET)
    return path


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A directory of another user's, as one with images may be."""
    path = tmp_path / "theirs"
    path.mkdir()
    os.chown(path, OTHER, OTHER)
    return path


@pytest.fixture
def shared(tmp_path) -> Path:
    """As /tmp."""
    path = tmp_path / "shared"
    path.mkdir()
    path.chmod(0o1777)
    return path


def link(path: Path, target: Path | str) -> Path:
    path.symlink_to(target)
    os.lchown(path, OTHER, OTHER)
    return path


def log(work: Path, name: str) -> None:
    with criu_files(work, RESTORING, log_file=name, level=4, pidfile=None):
        logging.getLogger("ovr.test").warning("something")


def pidfile(work: Path, name: str) -> None:
    with criu_files(work, RESTORING, log_file=None, level=2, pidfile=name) as finish:
        finish(restore_stats(pages=0, forking=0.5, total=1.0), 42)


def picture(work: Path, name: str) -> None:
    with picture_file(work / name) as writer:
        writer.write("<html>")


def stats(work: Path, name: str) -> None:
    write_image(work, name, [b"stats"])


def agent(work: Path, name: str) -> None:
    made = work.parent / "made"
    made.write_text("binary")
    deliver(made, work / name, 0o755)


WRITERS = (log, pidfile, picture, stats, agent)
REFUSED = (UsageError, LabError, UntrustedPath)


@root_only
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("place", ["theirs", "shared"])
def test_another_users_link_is_not_followed(write, place, victim, request):
    work = request.getfixturevalue(place)
    link(work / "file", victim)
    with pytest.raises(REFUSED, match="belongs to user 12345"):
        write(work, "file")
    assert victim.read_text() == SECRET
    assert [path.name for path in work.iterdir()] == ["file"]


@root_only
@pytest.mark.parametrize("write", WRITERS)
def test_another_users_link_to_a_directory_is_not_followed(write, shared, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    link(shared / "way", inner)
    with pytest.raises(REFUSED, match="belongs to user 12345"):
        write(shared, "way/file")
    assert list(inner.iterdir()) == []


@root_only
@pytest.mark.parametrize("write", WRITERS)
def test_nothing_is_written_in_another_users_directory(write, theirs):
    with pytest.raises(REFUSED, match="theirs belongs to user 12345"):
        write(theirs, "file")
    assert list(theirs.iterdir()) == []


@root_only
@pytest.mark.parametrize("write", [log, pidfile])
def test_the_cure_for_images_of_another_user(write, theirs, tmp_path):
    with pytest.raises(UsageError) as refused:
        write(theirs, "file")
    assert "-W DIR" in refused.value.hint
    write(theirs, str(tmp_path / "ours"))
    assert (tmp_path / "ours").read_text()


@root_only
@pytest.mark.parametrize("options", [["-o", "file"], ["--pidfile", "file"], ["--report", "file"]])
def test_the_command_refuses_before_it_does_anything(options, victim, theirs):
    link(theirs / "file", victim)
    where = ["-D", str(theirs)] if options[0] != "--report" else []
    done = subprocess.run(
        [sys.executable, "-m", "ovr", "restore", *where, "--vm", "qmp:/nowhere", *options],
        capture_output=True, text=True, check=False, cwd=theirs,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "belongs to user 12345" in done.stderr
    assert victim.read_text() == SECRET
    assert [path.name for path in theirs.iterdir()] == ["file"]


@root_only
def test_stats_in_another_users_directory_are_no_failure(theirs, tmp_path, caplog):
    with criu_files(
        theirs, RESTORING, log_file=None, level=2, pidfile=str(tmp_path / "pid")
    ) as finish:
        finish(restore_stats(pages=0, forking=0.5, total=1.0), 42)
    assert (tmp_path / "pid").read_text() == "42"
    assert list(theirs.iterdir()) == []


@pytest.mark.parametrize("write", WRITERS)
def test_a_directory_that_anyone_can_write_to_is_refused(write, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    work.chmod(0o777)
    with pytest.raises(REFUSED, match="others can write to the directory"):
        write(work, "file")
    assert list(work.iterdir()) == []


def open_to_others(tmp_path, mode):
    """A directory of root's in which others can make files."""
    work = tmp_path / "work"
    work.mkdir()
    os.chown(work, 0, OTHER)
    work.chmod(mode)
    return work


@root_only
@pytest.mark.parametrize("write", [log, picture, stats, agent])
@pytest.mark.parametrize("mode", [0o1777, 0o775])
def test_where_others_may_make_files(write, mode, tmp_path):
    """As in /tmp, and in a directory of a group: a new file, or one of ours."""
    work = open_to_others(tmp_path, mode)
    for _ in range(2):
        write(work, "new")
        assert (work / "new").stat().st_uid == os.geteuid()
    (work / "planted").write_text("theirs")
    os.chown(work / "planted", OTHER, OTHER)
    with pytest.raises(REFUSED, match="planted belongs to user 12345"):
        write(work, "planted")
    assert (work / "planted").read_text() == "theirs"


@root_only
@pytest.mark.parametrize("mode", [0o1777, 0o775])
def test_another_name_of_our_file_is_not_written_to(mode, victim, tmp_path):
    """fs.protected_hardlinks may be off."""
    work = open_to_others(tmp_path, mode)
    os.link(victim, work / "file")
    with pytest.raises(UsageError, match="has other names"):
        log(work, "file")
    assert victim.read_text() == SECRET


@root_only
def test_our_own_link_where_a_group_can_rename_it(victim, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    os.chown(work, 0, OTHER)
    work.chmod(0o775)
    (work / "file").symlink_to(victim)
    with pytest.raises(UsageError, match="is where others can put links"):
        log(work, "file")
    assert victim.read_text() == SECRET


@pytest.mark.parametrize("place", ["tmp_path", "shared"])
def test_our_own_links_are_followed(place, victim, tmp_path, request):
    work = request.getfixturevalue(place)
    (work / "file").symlink_to(victim)
    (work / "way").symlink_to(tmp_path)
    log(work, "file")
    assert "something" in victim.read_text()
    pidfile(work, "way/pid")
    assert (tmp_path / "pid").read_text() == "42"


def test_a_group_of_ones_own(tmp_path):
    """With the umask 002 that such groups are for a directory has mode 0775."""
    user = pwd.getpwuid(os.geteuid())
    if grp.getgrgid(user.pw_gid).gr_name != user.pw_name:
        pytest.skip("this user has no group of the same name")
    os.chown(tmp_path, user.pw_uid, user.pw_gid)
    tmp_path.chmod(0o775)
    (tmp_path / "real").touch()
    (tmp_path / "log").symlink_to("real")
    log(tmp_path, "log")
    assert "something" in (tmp_path / "real").read_text()


LOGS = """
import logging, sys
from pathlib import Path
from ovr.cli.criu_files import RESTORING, criu_files
with criu_files(Path(), RESTORING, log_file=sys.argv[1], level=4, pidfile=None):
    print("before", file=sys.stdout, flush=True)
    logging.getLogger("ovr.test").warning("something")
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/1"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_descriptor_of_our_own(name, kind, tmp_path):
    command = [sys.executable, "-c", LOGS, name]
    if kind == "pipe":
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=tmp_path)
        output = done.stdout.decode()
    else:
        with (tmp_path / "out").open("w") as file:
            subprocess.run(command, stdout=file, check=True, cwd=tmp_path)
        output = (tmp_path / "out").read_text()
    first, second = output.splitlines()  # nothing is truncated
    assert (first, "something" in second) == ("before", True)


@root_only
@pytest.mark.parametrize("write", [log, picture, agent])
def test_a_device_is_written_to_in_place(write, tmp_path):
    """As /dev/null; one of its own, or a test that fails would have put a file in its place."""
    device = tmp_path / "null"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    write(tmp_path, "null")
    assert stat.S_ISCHR(device.lstat().st_mode)


@pytest.mark.parametrize("place", ["tmp_path", "shared"])
def test_a_pipe_is_written_to(place, request):
    pipe = request.getfixturevalue(place) / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        log(pipe.parent, "pipe")
        assert "something" in reader.stdout.readline()
        reader.kill()


def test_a_report_to_standard_output(tmp_path):
    """By a link as /dev/stdout is."""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    program = "from pathlib import Path; from ovr.cli.picture import picture_file\n"
    program += "with picture_file(Path('stdout')) as writer: writer.write('<html>')"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, cwd=tmp_path
    )
    assert done.stdout == b"<html>"
    assert (tmp_path / "stdout").is_symlink()


@pytest.mark.parametrize(
    ("write", "mode"), [(log, 0o600), (stats, 0o600), (pidfile, 0o644), (agent, 0o755)]
)
def test_modes(write, mode, tmp_path):
    before = os.umask(0o022)
    try:
        write(tmp_path, "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_the_pidfile_is_the_one_that_was_made(tmp_path):
    """Another directory takes the place of the work directory meanwhile."""
    work, moved = tmp_path / "work", tmp_path / "moved"
    work.mkdir()
    with (
        pytest.raises(ZeroDivisionError),
        criu_files(work, RESTORING, log_file=None, level=2, pidfile="pid"),
    ):
        work.rename(moved)
        work.mkdir()
        (work / "pid").write_text("1")
        1 / 0  # noqa: B018
    assert list(moved.iterdir()) == []
    assert (work / "pid").read_text() == "1"


@pytest.mark.parametrize("path", ["/", "..", ".", "a/..", "a/", "no/", ""])
def test_what_names_no_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError):
        locate(path)


def test_links_that_lead_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError) as found:
        locate(tmp_path / "a" / "file")
    assert found.value.errno == errno.ELOOP


@pytest.mark.parametrize("path", ["a/b/file", "a//b/./file", "a/../a/b/file", "./l/file", "m/file"])
def test_where_paths_lead(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "l").symlink_to("a/b")
    (tmp_path / "m").symlink_to(tmp_path / "a" / ".." / "l")
    directory, name = locate(path)
    with directory:
        assert name == "file"
        os.close(directory.create(name))
    assert (tmp_path / "a" / "b" / "file").exists()


def test_no_descriptor_is_lost(tmp_path):
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    for path in (tmp_path / "a", tmp_path / "no" / "a", Path("/")):
        with suppress(OSError):
            locate(path)[0].close()
    for path in (tmp_path, tmp_path / "new", Path("/dev/null")):
        with suppress(OSError):
            Directory.private(path, create=True).close()
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_a_private_directory_does_not_need_the_current_one(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    Directory.private(tmp_path / "a", create=True).close()


@root_only
def test_a_relative_private_directory_is_checked_up_to_the_root(tmp_path, monkeypatch):
    (tmp_path / "theirs" / "a").mkdir(parents=True)
    os.chown(tmp_path / "theirs", OTHER, OTHER)
    monkeypatch.chdir(tmp_path / "theirs" / "a")
    with pytest.raises(UntrustedPath, match="theirs belongs to user 12345"):
        Directory.private("b", create=True)


def test_a_private_directory_is_made_with_all_on_the_way(tmp_path):
    with Directory.private(tmp_path / "a" / "b", create=True):
        pass
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    with pytest.raises(FileNotFoundError):
        Directory.private(tmp_path / "c")


@root_only
def test_the_agent_is_not_taken_from_another_users_directory(tmp_path, monkeypatch):
    """They would have it run by root of a guest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "ovr" / "agent"
    place.mkdir(mode=0o700, parents=True)
    os.chown(place, OTHER, OTHER)
    with pytest.raises(LabError, match="agent belongs to user 12345"):
        build()
    assert list(place.iterdir()) == []


@root_only
def test_the_labs_cache_is_not_another_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / ".thing.tmp-precious").mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    link(tmp_path / "cache" / "ovr", elsewhere)
    with pytest.raises(LabError, match="belongs to user 12345"):
        cached("thing", lambda work: (work / "file").touch())
    assert [path.name for path in elsewhere.iterdir()] == [".thing.tmp-precious"]
