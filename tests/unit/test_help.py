"""The parser takes all commands and options of the help and the man page."""

import argparse
import ast
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from ovr import cli
from ovr.cli.dump_plan import show
from ovr.dump.plan import Area, DumpPlan, Reason, SharedPlan, TaskPlan
from ovr.dump.report import DumpReport
from ovr.lab.demo import Answer, Demo
from ovr.lab.demo_move import MoveDemo
from ovr.move import MoveReport
from ovr.restore.report import Report

ROOT = Path(__file__).parents[2]
MAN_PAGE = ROOT / "docs" / "ovr.8"


def parsers(parser=None, words=()):
    """All parsers of the command line, with the words that lead to each."""
    parser = parser or cli.make_parser()
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from parsers(command, (*words, word))


PARSERS = dict(parsers())


def commands(text):
    """The lines of a text that are commands of ovr."""
    for line in text.replace("\\\n", " ").splitlines():
        if match := re.match(r"\s*(?:\w+=\S+ )*(?:python -m )?ovr ([a-z-].*)", line):
            yield re.split(r" {2,}(?![ -])", match[1])[0]  # what comes then explains it


def parse(line):
    words = shlex.split(line.split(" > ")[0], comments=True)
    cli.make_parser().parse_args(words)


@pytest.mark.parametrize("words", PARSERS, ids=" ".join)
def test_examples_in_help(words, monkeypatch):
    monkeypatch.setenv("OVR_VM", "lab:x")
    text = PARSERS[words].format_help()
    if len(words) == 1:
        examples = text.split("examples:\n")[1].split("\n\n")[0]
        assert list(commands(examples))
        assert PARSERS[words].description
        for line in commands(examples):
            parse(line)


def options_of(parser):
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            yield from (text for text in action.option_strings if text.startswith("--"))


@pytest.mark.parametrize("words", PARSERS, ids=" ".join)
def test_the_man_page_has_every_command_and_option(words):
    text = MAN_PAGE.read_text().replace("\\-", "-")
    assert " ".join(words) in text
    missing = {name for name in options_of(PARSERS[words]) if name not in text}
    assert missing <= {"--no-la57", "--no-display-stats"}


def test_examples_in_the_man_page():
    examples = MAN_PAGE.read_text().replace("\\-", "-").split(".SH EXAMPLES")[1].split(".EE")[0]
    assert len(list(commands(examples))) > 3
    for line in commands(examples):
        parse(line)


def test_the_man_page_renders_without_warnings():
    if shutil.which("groff") is None:
        pytest.skip("needs groff: apt-get install groff-base")
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-P-c", MAN_PAGE],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    text = re.sub(".\b", "", done.stdout)
    for section in ("NAME", "SYNOPSIS", "EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES"):
        assert f"\n{section}\n" in text


def run(capsys, *words):
    assert cli.main(list(words)) == 0
    return capsys.readouterr().out


def completed(script, *words):
    """Return bash's completions of the last word."""
    program = f"""source {script}
COMP_WORDS=({shlex.join(["ovr", *words])}); COMP_CWORD={len(words)}
COMP_LINE="ovr {" ".join(words)}"; COMP_POINT=${{#COMP_LINE}}
$(complete -p ovr | sed 's/.*-F \\([^ ]*\\).*/\\1/') ovr {shlex.quote(words[-1])} ovr
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["re"], {"restore"}),
        (["agent", ""], {"build", "unit", "cloud-init", "deb"}),
        (["restore", "--pid"], {"--pidfile"}),
        (["restore", "--verify", ""], {"none", "sample", "full"}),
        (["mo"], {"move"}),
        (["move", "--fr"], {"--from", "--from-agent", "--from-vmlinux"}),
        (["lab", "up", "--su"], {"--suite"}),
    ],
)
def test_completion_in_bash(capsys, tmp_path, words, offered):
    script = tmp_path / "ovr.bash"
    script.write_text(run(capsys, "completion", "bash"))
    assert set(completed(script, *words)) >= offered


def test_completion_of_files(capsys, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "image.txt").touch()
    script = tmp_path / "ovr.bash"
    script.write_text(run(capsys, "completion", "bash"))
    monkeypatch.chdir(tmp_path)
    assert completed(script, "restore", "-D", "im") == ["images"]


def test_completion_for_zsh(capsys):
    text = json.loads(run(capsys, "completion", "zsh", "--json"))["text"]
    assert text.startswith("#compdef ovr")
    if shutil.which("zsh"):
        subprocess.run(["zsh", "-n", "/dev/stdin"], input=text, text=True, check=True)


def literals():
    """All pieces of text in the sources, those of f-strings too."""
    for path in (ROOT / "ovr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_troubleshooting_quotes_real_messages():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^### (.*)$", text, re.MULTILINE)
    known = list(literals())
    assert len(messages) > 20
    for message in messages:
        for piece in filter(None, message.split("…")):
            assert any(piece.strip() in literal for literal in known), message


JSON = (ROOT / "docs" / "json.md").read_text()


def test_every_schema_is_documented():
    schemas = {text for text in literals() if re.fullmatch(r"ovr\.[a-z.]+/\d+", text)}
    assert len(schemas) > 10
    assert schemas == set(re.findall(r"^\| `(ovr\.[a-z.]+/\d+)` ", JSON, re.MULTILINE))


def keys(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from () if key == "value" else keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


@pytest.mark.parametrize("words", [("states",), ("list",), ("lab", "ls"), ("agent", "unit")])
def test_fields_are_documented(capsys, words):
    document = json.loads(run(capsys, *words, "--json"))
    assert {key for key in keys(document) if f"`{key}`" not in JSON} == set()


def test_fields_of_a_plan_are_documented(capsys, dumps):
    document = json.loads(run(capsys, "plan", "--json", "-D", str(dumps / "one")))
    assert {key for key in keys(document) if f"`{key}`" not in JSON} == set()


def test_fields_of_a_restore_are_documented():
    fields = Report(held={"count": 1, "seconds": 1, "longest": 1}).as_json()
    assert {key for key in keys(fields) if f"`{key}`" not in JSON} == set()


def test_fields_of_a_dump_are_documented():
    fields = DumpReport(held={"count": 1, "seconds": 1, "longest": 1}).as_json()
    assert {key for key in keys(fields) if f"`{key}`" not in JSON} == set()


def test_fields_of_a_demo_are_documented():
    demo = Demo(DumpReport(), Report(), Answer(1, 2, 0, 0, "0137"), 16, 0o137)
    for one in (demo, replace(demo, report=None)):
        assert {key for key in keys(one.as_json()) if f"`{key}`" not in JSON} == set()


def test_fields_of_a_move_are_documented():
    section = JSON.split("\n## ovr.move/1\n")[1].split("\n## ")[0]
    report = MoveReport(seconds={"total": 1}, held={"source": {}, "destination": {}})
    fields = report.as_json()
    assert {key for key in (*fields, *fields["held"]) if f"`{key}`" not in section} == set()
    demo = MoveDemo(report, Answer(1, 2, 0, 0, "0137"), 0.1, 0.01, 16, 0o137).as_json()
    assert {key for key in keys(demo) if f"`{key}`" not in JSON} == set()


def test_fields_of_the_plan_of_a_dump_are_documented(capsys):
    task = TaskPlan(1, "one", (1,), (Area(0, 4096, 4096, Reason.OUTSIDE),))
    show(DumpPlan((task,), (SharedPlan(1, (1,), Reason.SEALED),)), argparse.Namespace(json=True))
    document = json.loads(capsys.readouterr().out)
    assert {"tasks", "areas", "pids"} <= set(keys(document))
    assert {key for key in keys(document) if f"`{key}`" not in JSON} == set()
