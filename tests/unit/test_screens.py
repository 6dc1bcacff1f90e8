"""Screens that need no VM, as golden files."""

import sys
import textwrap

import pytest

from tests.screens import assert_golden, screen

OVR = (sys.executable, "-m", "ovr")


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse formats help differently")
@pytest.mark.parametrize("command", [(), ("dump",), ("restore",), ("move",), ("check",)])
def test_help(command):
    shown = screen([*OVR, *command, "--help"], height=150)
    assert_golden("-".join(("help", *command)), shown)


@pytest.mark.parametrize("dumps", ["trixie"], indirect=True)
def test_plan(dumps):
    assert_golden("plan", screen([*OVR, "plan", "-D", dumps / "tree"]))


def test_states():
    assert_golden("states", screen([*OVR, "states"], width=140, height=100))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("error-no-vm", ("check", "--vm", "name:nobody")),
        ("error-images", ("plan", "-D", "/nowhere")),
        ("error-option", ("restore", "--vm", "lab:x", "--lazy-pages")),
        ("error-dump-option", ("dump", "-t", "1", "--vm", "lab:x", "--track-mem")),
    ],
)
def test_errors(name, arguments):
    assert_golden(name, screen([*OVR, *arguments]))


def test_no_color():
    shown = screen([*OVR, "check", "--vm", "name:nobody"], env={"NO_COLOR": "1"})
    assert "\x1b" not in shown
    assert "ovr: " in shown


def test_a_bar_half_way():
    program = """\
        import sys, time
        from ovr.cli.progress import BarWatch
        watch = BarWatch(sys.stderr, iter([0.0, 0.7, 0.8]).__next__)
        with watch("memory"):
            watch.advance(3 << 29, 1 << 32)
            time.sleep(1000)
        """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    assert_golden("progress", screen(command, until="%"))


def test_list():
    program = """\
        from ovr import cli
        from ovr.cli import list
        from ovr.errors import CheckFailed
        from ovr.vm.census import FoundVm
        no = CheckFailed("RAM is not shared", "start QEMU with share=on")
        list.found_vms = lambda: [
            FoundVm(100, "web", ("libvirt:web", "name:web"), "vsock:3", "running", 4 << 30, None),
            FoundVm(2000, None, ("pid:2000",), None, "running", None, no),
        ]
        cli.main(["list", "-v"])
        """
    assert_golden("list", screen([sys.executable, "-c", textwrap.dedent(program)]))
