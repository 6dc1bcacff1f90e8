"""Tools of the host that are missing or fail: errors of one line."""

import os
import subprocess

import pytest

from ovr.errors import LabError
from ovr.lab import tools
from ovr.lab.tools import mmdebstrap, need_tool, run_tool


def test_missing_tool_says_what_to_type(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(LabError, match="no-such-tool is not installed") as caught:
        need_tool("no-such-tool", "its-package")
    assert caught.value.hint == "apt-get install its-package"
    assert need_tool("mke2fs", "e2fsprogs").endswith("sbin/mke2fs")


def test_failing_tool_gives_its_last_word(tmp_path):
    run_tool(["/bin/true"])
    with pytest.raises(LabError, match=r"sh failed: two$"):
        run_tool(["/bin/sh", "-c", "echo one >&2; echo two >&2; exit 1"])
    with pytest.raises(LabError, match=r"sh failed: E: it$"):
        run_tool(["/bin/sh", "-c", "echo E: it; echo I: cleaning up; exit 1"])
    with pytest.raises(LabError, match=r"sh failed: E: Unable to locate package x$"):
        # As mmdebstrap does: each error with the ones that it led to.
        run_tool(["/bin/sh", "-c", "echo E: Unable to locate package x; echo E: so not; exit 1"])
    with pytest.raises(LabError, match="false failed: no message"):
        run_tool(["/bin/false"])
    with pytest.raises(LabError, match="cannot be run"):
        run_tool([str(tmp_path / "none")])


def fake_program(path, script=""):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_mmdebstrap_for_who_is_not_root(tmp_path, monkeypatch):
    monkeypatch.setattr(tools.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(
        tools.shutil, "which",
        lambda name, path=None: str(tmp_path / name) if (tmp_path / name).exists() else None,
    )  # fmt: skip
    fake_program(tmp_path / "mmdebstrap", 'printf "%s\\n" "$@" > "$0.args"')
    with pytest.raises(LabError, match="newuidmap is not installed") as caught:
        mmdebstrap("trixie", "minbase", ["criu"], tmp_path / "tar")
    assert caught.value.hint == "apt-get install uidmap"
    fake_program(tmp_path / "newuidmap")
    mmdebstrap("trixie", "minbase", ["criu", "perl"], tmp_path / "tar")
    words = (tmp_path / "mmdebstrap.args").read_text().splitlines()
    assert words[-2:] == ["trixie", str(tmp_path / "tar")]
    assert {"--variant=minbase", "--format=tar", "--include=criu,perl"} <= set(words)


def test_another_release_of_the_suites_mirror(tmp_path, monkeypatch):
    fake_program(tmp_path / "mmdebstrap", 'printf "%s\\n" "$@" > "$0.args"')
    monkeypatch.setattr(tools, "need_tool", lambda program, package: str(tmp_path / program))
    etc = tmp_path / "root" / "etc" / "apt"
    (etc / "sources.list.d").mkdir(parents=True)
    lines = ("deb http://mirror/debian trixie main", "deb http://other/security trixie-security x")
    (etc / "sources.list").write_text("\n".join(lines))

    def added(release):
        mmdebstrap("trixie", "extract", ["k"], tmp_path / "tar", release=release)
        words = (tmp_path / "mmdebstrap.args").read_text().splitlines()
        for word in words:
            if word.startswith("--setup-hook="):
                hook = word.removeprefix("--setup-hook=")
                subprocess.run(["sh", "-ec", hook, "sh", tmp_path / "root"], check=True)
        lists = list((etc / "sources.list.d").iterdir())
        return "".join(path.read_text() for path in lists).splitlines()

    assert added("trixie") == []
    assert added("trixie-security") == []  # apt refuses to be told twice
    assert added("trixie-backports") == ["deb http://mirror/debian trixie-backports main"]


def test_a_script_when_packages_are_unpacked(tmp_path, monkeypatch):
    fake_program(tmp_path / "mmdebstrap", 'printf "%s\\n" "$@" > "$0.args"')
    monkeypatch.setattr(tools, "need_tool", lambda program, package: str(tmp_path / program))
    mmdebstrap("trixie", "extract", [], tmp_path / "tar", script="true")
    words = (tmp_path / "mmdebstrap.args").read_text().splitlines()
    assert [word for word in words if word.startswith(("--include", "--extract-hook"))] == [
        '--extract-hook=export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"; true'
    ]
