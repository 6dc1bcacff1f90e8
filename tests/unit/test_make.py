"""Every `make` of the documents: there is the target, and its program takes what it is given."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from ovr import cli
from tests.documents import DOCUMENTS, ROOT, block, blocks, commands, inline

FENCED = [
    *blocks("docs/fuzzing.md", "sh"),
    *blocks("docs/stress.md", "sh"),
    *blocks("bench/README.md", "sh"),
    block("README.md", "make demo"),
    block("README.md", "make test"),
]
MAKE, PROGRAM = r"(?:\w+=\S+ )*make ", r"(?:\S*/)?python -m (?!ovr\b)"
LINES = {line for text in FENCED for line in commands(text)} | {
    words
    for document in DOCUMENTS
    for words in inline(document)
    if re.match(f"{MAKE}|{PROGRAM}", words)
}


@pytest.mark.parametrize("line", sorted(LINES))
def test_its_program_takes_it(line):
    """For what is no `make`, too, which is a program itself."""
    recipe = recipe_of(line) if re.match(MAKE, line) else line
    programs = re.findall(r"^(?:\w+=\S+ )?(?:\S*/)?python -m (\S+) ?(.*)$", recipe, re.MULTILINE)
    assert programs, recipe
    for module, arguments in programs:
        takes(module, *shlex.split(arguments))


def recipe_of(line: str) -> str:
    """Return what make would run; without what it would install."""
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(
        ["bash", "-euc", line.replace("make ", "make --no-print-directory -n PACKAGES= ")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\\\n", " ")


@cache
def takes(module: str, *arguments: str) -> None:
    """Fail if the module does not exist, or does not take these arguments."""
    missing = [word for word in arguments if re.match(r"(tests|bench)/", word)
               and not (ROOT / word).exists()]  # fmt: skip
    assert not missing
    spec = find_spec(module)
    assert spec is not None, module
    if module == "ovr":
        cli.make_parser().parse_args(arguments)
    elif module == "pytest":
        finds_tests(arguments)
    else:
        name = f"{module}.__main__" if spec.submodule_search_locations else module
        if "def parse(" in Path(find_spec(name).origin).read_text():
            import_module(name).parse(arguments)


def finds_tests(arguments: tuple[str, ...]) -> None:
    """Of benchmarks with options: that pytest knows these, and that some test is meant."""
    if arguments[0] != "bench" or {*arguments[1:]} <= {"-q", "-rs"}:
        return  # run all the time
    # Not as what runs this test: beside others there are no benchmarks.
    alone = {name: word for name, word in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "--collect-only", "-q"],
        cwd=ROOT, env=alone, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
