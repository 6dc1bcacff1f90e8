"""The agent's packages, read by the tools that read them in the guest."""

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from elftools.elf.elffile import ELFFile

from ovr import cli
from ovr.errors import LabError
from ovr.guest import build, package
from ovr.guest.client.link import parse_address
from ovr.guest.protocol import VSOCK_PORT
from tests.documents import block
from tests.documents import run as shell

ROOT = Path(__file__).parents[2]
NAME = f"ovr-agent_{version('ovr')}_amd64.deb"


def run(capsys, *words):
    assert cli.main(["agent", *map(str, words)]) == 0
    return capsys.readouterr().out


def usage(program):
    return subprocess.run([program, "--help"], capture_output=True, text=True, check=False)


def test_the_agents_port_is_privileged_and_the_same_everywhere():
    """The kernel gives a port below 1024 to root only; whoever has another one is not found."""
    assert VSOCK_PORT < 1024
    for path in (
        "ovr/guest/packaging/ovr-agent.service", "ovr/guest/packaging/control", "docs/guest.md",
        "ovr/lab/init.c", "SECURITY.md", "docs/ovr.8",
    ):  # fmt: skip
        text = (ROOT / path).read_text().replace('", "', " ").replace("\\-", "-")
        found = re.findall(r"(?:--vsock-port|vsock port) (\d+)", text)
        assert found, path
        assert set(found) == {str(VSOCK_PORT)}, path
    assert f"--vsock-port {VSOCK_PORT} " in usage(build()).stderr
    assert parse_address("vsock:3").port == VSOCK_PORT


def test_a_port_that_is_not_privileged_is_complained_of():
    for port, complaint in ((VSOCK_PORT, False), (1023, False), (1024, True)):
        done = subprocess.run(
            [build(), "--vsock-port", str(port), "--dir", "/proc/nowhere"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ("any user of this guest can serve it" in done.stderr) is complaint


def test_build(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "build") == "ovr-agent\n"
    done = usage(tmp_path / "ovr-agent")
    assert (done.returncode, "usage: ovr-agent" in done.stderr) == (2, True)
    with (tmp_path / "ovr-agent").open("rb") as file:
        segments = {segment["p_type"] for segment in ELFFile(file).iter_segments()}
    assert "PT_LOAD" in segments
    if not os.environ.get("OVR_SANITIZE"):
        assert "PT_INTERP" not in segments  # no loader, no libraries
    other = json.loads(run(capsys, "build", "--json", "-o", tmp_path / "other"))
    assert other["path"] == str(tmp_path / "other")
    assert other["size"] == (tmp_path / "other").stat().st_size


def test_systemd_understands_the_unit(capsys, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze: apt-get install systemd")
    text = run(capsys, "unit")
    # Its program must exist where the verification takes place.
    program = tmp_path / "ovr-agent"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    file = tmp_path / "ovr-agent.service"
    file.write_text(text.replace(package.AGENT_PATH, str(program)))
    verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(file)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    file.write_text(file.read_text() + "[Service]\nNoSuchOption=1\n")
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert "NoSuchOption" in done.stderr  # so it would have complained


def test_restored_processes_inherit_nothing_from_the_unit(capsys):
    """The unit has no settings that tasks would keep for good."""
    settings = dict(
        line.split("=", 1) for line in run(capsys, "unit").splitlines() if re.match(r"\w+=", line)
    )
    assert settings["KillMode"] == "process"
    assert settings["ExecStart"].split()[0] == package.AGENT_PATH
    forbidden = "System|Capability|Protect|Private|Restrict|NoNew|Device|IPAddress|Lock|Memory"
    assert not [name for name in settings if re.match(forbidden, name)]


def test_cloud_init(tmp_path):
    assert shell(block("docs/guest.md", "ovr agent cloud-init"), tmp_path) == ""
    text = (tmp_path / "user-data").read_text()
    assert text.startswith("#cloud-config\n")
    config = yaml.safe_load(text)
    agent, unit = config["write_files"]
    assert (agent["path"], agent["permissions"]) == (package.AGENT_PATH, "0755")
    assert gzip.decompress(base64.b64decode(agent["content"])).startswith(b"\x7fELF")
    assert unit["path"] == "/etc/systemd/system/ovr-agent.service"
    assert unit["content"] == package.unit()
    assert config["packages"] == ["criu"]
    assert config["runcmd"][-1] == ["systemctl", "enable", "--now", "ovr-agent.service"]


@pytest.fixture(scope="module")
def deb(tmp_path_factory):
    directory = tmp_path_factory.mktemp("deb")
    return package.debian_package(directory, "A B <a@example.org>")


def dpkg_deb(*words):
    return subprocess.run(["dpkg-deb", *words], capture_output=True, text=True, check=True).stdout


def test_the_packages_fields(deb):
    assert deb.name == NAME
    fields = dict(
        line.split(": ", 1) for line in dpkg_deb("--field", str(deb)).splitlines() if line[0] != " "
    )
    assert fields["Package"] == "ovr-agent"
    assert fields["Version"] == version("ovr")
    assert fields["Maintainer"] == "A B <a@example.org>"
    assert fields["Depends"] == "criu"
    assert 300 < int(fields["Installed-Size"]) < 3000
    assert len(fields["Description"]) < 80


def test_the_packages_files(deb, tmp_path):
    lines = [line.split(None, 5) for line in dpkg_deb("--contents", str(deb)).splitlines()]
    found = {line[5].strip("./"): (line[0], line[1]) for line in lines}
    assert {owner for _, owner in found.values()} == {"root/root"}
    files = {name: mode for name, (mode, _) in found.items() if mode[0] == "-"}
    assert files == {
        "usr/sbin/ovr-agent": "-rwxr-xr-x",
        "usr/lib/systemd/system/ovr-agent.service": "-rw-r--r--",
        "usr/share/doc/ovr-agent/copyright": "-rw-r--r--",
        "usr/share/doc/ovr-agent/changelog.gz": "-rw-r--r--",
    }
    assert {mode for mode, _ in found.values() if mode[0] == "d"} == {"drwxr-xr-x"}
    dpkg_deb("--extract", str(deb), str(tmp_path))
    assert "usage: ovr-agent" in usage(tmp_path / "usr/sbin/ovr-agent").stderr
    doc = tmp_path / "usr/share/doc/ovr-agent"
    news = gzip.decompress((doc / "changelog.gz").read_bytes()).decode()
    assert re.search(r"^ -- A B <a@example\.org>  \w{3}, \d\d \w{3} \d{4} ", news, re.MULTILINE)
    licence = " ".join((ROOT / "LICENSE").read_text().split()[8:])
    assert licence in " ".join((doc / "copyright").read_text().replace("\n .", "\n").split())


def test_the_maintainer_scripts(deb, tmp_path):
    dpkg_deb("--control", str(deb), str(tmp_path))
    for name in ("postinst", "prerm", "postrm"):
        script = tmp_path / name
        assert script.stat().st_mode & 0o777 == 0o755
        assert script.read_text().startswith("#!/bin/sh\nset -e\n")
        subprocess.run(["sh", "-n", script], check=True)


@pytest.mark.parametrize(
    ("script", "words", "calls"),
    [
        ("postinst", ["configure", ""], ["enable ovr-agent.service"]),
        ("postinst", ["configure", "0.0.1"], []),
        ("postinst", ["abort-upgrade"], []),
        ("prerm", ["upgrade", "2"], []),
        ("postrm", ["remove"], ["disable ovr-agent.service"]),
        ("postrm", ["purge"], []),
    ],
)
def test_what_the_scripts_do_without_systemd_running(deb, tmp_path, script, words, calls):
    """As in a chroot that becomes an image: enabled, not started."""
    dpkg_deb("--control", str(deb), str(tmp_path))
    log = tmp_path / "log"
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    systemctl.chmod(0o755)
    text = (tmp_path / script).read_text().replace("/run/systemd/system", "/nowhere")
    subprocess.run(
        ["sh", "-c", text, script, *words], check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
    )
    assert (log.read_text().splitlines() if log.exists() else []) == calls


def test_reproducible(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    one, two = (package.debian_package(tmp_path / name, "A <a@b.c>") for name in ("1.deb", "2.deb"))
    assert one.read_bytes() == two.read_bytes()


def test_without_dpkg(tmp_path, monkeypatch):
    package.build(flags=("-static", "-s"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match="dpkg-deb"):
        package.debian_package(tmp_path, "A <a@b.c>")
