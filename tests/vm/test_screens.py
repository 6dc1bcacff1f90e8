"""Screens of a restore, as golden files; see `tests.screens`."""

import sys
from xml.etree import ElementTree

import pytest

from tests.screens import assert_golden, screen
from tests.vm.conftest import end_workload

OVR = (sys.executable, "-m", "ovr")
MASKS = {
    r"test-\d+-\d+": "NAME",
    r"\S*/vsock:687": "ADDR",
    r"\d+(\.\d+)? ms": "N ms",
    r"\d+\.\d+ s\b": "N s",
    r"\bpid \d+": "pid N",
    r"QEMU [\d.]+": "QEMU N",
    r"CRIU [\d.]+": "CRIU N",
    r"version [\d.]+": "version N",
    r"\d+\.\d+\.\d+\S*amd64": "RELEASE",
    r"is 0x[0-9a-f]+": "is FLAG",
}
# A stack has a page more or less, by where it was put.
SIZES = {r"(\d+)\.\d MiB\b": r"\1.N MiB"}


@pytest.fixture
def suite() -> str:
    return "trixie"


def test_check(vm):
    assert_golden("check", screen([*OVR, "check", "--vm", f"lab:{vm.name}"]), MASKS)


def test_restore(vm, dump, tmp_path):
    picture = tmp_path / "restore.html"
    command = [*OVR, "restore", "-D", dump.path, "--vm", f"lab:{vm.name}", "--report", picture]
    assert_golden("restore", screen(command, width=160), {**MASKS, **SIZES})
    html = picture.read_text()
    for part in html.split("<svg")[1:]:
        ElementTree.fromstring(f"<svg{part.split('</svg>')[0]}</svg>")
    assert f"VM lab:{vm.name}" in html
    assert all(f">{phase}</text>" in html for phase in ("attach", "skeleton", "memory", "commit"))

    again = screen([*OVR, "restore", "-D", dump.path, "--vm", f"lab:{vm.name}"], width=160)
    assert_golden("restore-taken", again, MASKS)
    end_workload(vm)
    talkative = screen([*command, "-v"], height=900)
    assert "skeleton stands" in talkative
