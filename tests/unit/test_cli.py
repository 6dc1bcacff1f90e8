"""The command line without a VM: results on stdout, one-line errors on stderr, exit codes."""

import json
import subprocess
import sys

import pytest

from ovr import cli, errors
from ovr.cli import check
from ovr.errors import OvrError


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_plan_of_a_real_dump(dumps, capsys):
    code, out, err = run(capsys, "plan", "-D", dumps / "one")
    assert (code, err) == (0, "")
    assert "states outside: memory" in out
    assert "vDSO" in out


def test_plan_as_json_names_every_run(dumps, capsys):
    code, out, _ = run(capsys, "plan", "--json", "-D", dumps / "one")
    plan = json.loads(out)
    assert code == 0
    assert plan["schema"] == "ovr.plan/1"
    [task] = plan["tasks"]
    runs = [*task["runs"], *(run for shared in plan["shared"] for run in shared["runs"])]
    assert sum(one["end"] - one["start"] for one in runs) == plan["bytes_total"]
    assert {one["where"] for one in task["runs"]} == {"outside", "inside"}
    assert all(one["reason"] and one["text"] for one in task["runs"])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("restore", "-D", "/nowhere", "--vm", "shoe:1"), 2, "shoe:1"),
        (("restore", "-D", "/nowhere", "--vm", "qmp:/nowhere"), 3, "/nowhere"),
        (("dump", "-D", "/nowhere", "-t", "1", "--vm", "shoe:1"), 2, "shoe:1"),
        (("dump", "-D", "/nowhere", "-t", "1", "--vm", "qmp:/nowhere"), 3, "/nowhere"),
        (("dump", "-t", "1", "--vm", "qmp:/nowhere", "--dry-run"), 3, "/nowhere"),
        (("dump", "-t", "one", "--vm", "qmp:/nowhere"), 2, "'one' is not a pid"),
        (("move", "-t", "1", "--from", "qmp:/nowhere", "--to", "qmp:/x"), 3, "/nowhere"),
        (("move", "--from", "qmp:/nowhere", "--to", "qmp:/x"), 2, "-t PID"),
        (("move", "--back", "--from", "qmp:/nowhere"), 3, "/nowhere"),
        (("plan", "-D", "/nowhere"), 2, "/nowhere"),
        (("ps", "--vm", "pid:1"), 3, "not QEMU"),
        (("check", "--vm", "lab:no-such-vm"), 3, "no-such-vm"),
        (("lab", "sh", "no-such-vm", "true"), 1, "no-such-vm"),
        (("lab", "up", "a/b"), 2, "a/b"),
    ],
)
def test_errors_are_one_line_with_a_cure(capsys, arguments, code, words):
    got, out, err = run(capsys, *arguments)
    assert (got, out) == (code, "")
    [line] = err.splitlines()
    assert line.startswith("ovr: ")
    assert words in line
    got, out, _ = run(capsys, arguments[0], *arguments[1:], "--json")
    problem = json.loads(out)
    assert problem["schema"] == "ovr.error/1"
    assert problem["exit_code"] == got == code
    assert hasattr(errors, problem["kind"])


def test_the_guests_words_are_kept_off_the_terminal(capsys):
    cli.output.error(OvrError("bad \x1b[31m name\nwith lines", "do\tthis"), as_json=False)
    err = capsys.readouterr().err
    assert err == "ovr: bad ?[31m name with lines (do?this)\n"


def test_no_command_is_an_error():
    done = subprocess.run([sys.executable, "-m", "ovr"], capture_output=True, check=False)
    assert done.returncode == 2


@pytest.mark.parametrize(
    "command", ["dump", "restore", "move", "plan", "ps", "check", "lab", "demo"]
)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out) > 200


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (None, ["--agent ADDR", "<vsock>", "org.ovr.0"]),
        ("unix:/nowhere", ["ovr agent deb", "apt install"]),
    ],
)
def test_check_says_how_to_get_an_agent(address, words):
    [item] = check._agent(check._Look(None), address)
    assert not item.ok
    assert [word for word in words if word not in item.fix] == []


def every_error(kind=OvrError):
    yield kind
    for sub in kind.__subclasses__():
        yield from every_error(sub)


def test_exit_codes_are_the_documented_ones():
    assert {kind.exit_code for kind in every_error()} == {*range(1, 10)}
    for name in errors.__all__:
        assert getattr(errors, name).__doc__
