"""Every block of the documents can be pasted and has a test; every command in them is one."""

import ast
import re
import shlex
import subprocess
from functools import cache

import pytest

from ovr import cli
from tests import documents
from tests.documents import DOCUMENTS, ROOT, all_blocks, inline

LANGUAGES = {"sh", "python", "xml", "text"}
RUN = {"sh", "python", "xml"}
BLOCKS = [
    pytest.param(document, block, id=f"{document}-{number}")
    for document in DOCUMENTS
    for number, block in enumerate(all_blocks(document))
]
COMMANDS = sorted({words for document in DOCUMENTS for words in inline(document)})
OVR = re.compile(r"\s*(?:\w+=\S+ )*(?:\S*python -m )?ovr( .*)?")


@cache
def asked_for() -> frozenset[tuple[str, str, str]]:
    """The calls of `block` and `blocks` in tests: name, document, words or language."""
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(ast.Name("block" | "blocks" as name), arguments):
                    found.add((name, *map(ast.literal_eval, arguments)))
    return frozenset(found)


@pytest.mark.parametrize(("document", "block"), BLOCKS)
def test_a_block_says_what_it_is_and_has_a_test(document, block):
    assert block.language in LANGUAGES, "tag the fence"
    if block.language not in RUN:
        return
    assert ("blocks", document, block.language) in asked_for() or [
        words
        for call, where, words in asked_for()
        if (call, where) == ("block", document) and words in block.text
    ], "no test runs this: see tests/documents.py"


def test_what_is_asked_for_is_one_block():
    for call, document, what in asked_for():
        {"block": documents.block, "blocks": documents.blocks}[call](document, what)


def test_no_fence_is_overlooked():
    """Indented ones would be: nobody knows what is in them."""
    for document in DOCUMENTS:
        fences = re.findall(r"^\s*(?:```|~~~)", (ROOT / document).read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(all_blocks(document)), document


def test_every_example_has_a_test():
    text = (ROOT / "tests" / "vm" / "test_examples.py").read_text()
    examples = [path.name for path in (ROOT / "examples").iterdir() if path.is_file()]
    assert examples
    assert [name for name in examples if name not in text] == []


@pytest.mark.parametrize(
    ("document", "block"), [each for each in BLOCKS if each.values[1].language == "sh"]
)
def test_commands_can_be_pasted(document, block, monkeypatch):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    assert "…" not in block.text
    monkeypatch.setenv("OVR_VM", "lab:x")
    for line in block.text.replace("\\\n", " ").splitlines():
        if OVR.fullmatch(line):
            parse(line)


@pytest.mark.parametrize("words", [words for words in COMMANDS if OVR.fullmatch(words)])
def test_commands_in_sentences(words, monkeypatch):
    """Whole ones, or names of commands, which have a help text."""
    monkeypatch.setenv("OVR_VM", "lab:x")
    named = re.fullmatch(r"(.*?ovr( [a-z][a-z-]*)*)( …)?", words)
    parse(f"{named[1]} --help" if named else words)


def parse(line: str) -> None:
    """Have ovr's own parser read the line's command."""
    words = shlex.split(OVR.fullmatch(line)[1], comments=True)
    if ">" in words:
        words = words[: words.index(">")]
    if "--help" in words:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.make_parser().parse_args(words)
    else:
        cli.make_parser().parse_args(words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_nothing_is_left_to_fill_in(document):
    assert not re.findall(r"@[A-Z]+@|\b(?:TODO|TBD|FIXME|XXX)\b", (ROOT / document).read_text())
