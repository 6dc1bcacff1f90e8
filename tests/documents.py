"""The fenced blocks of the documents: commands, programs, XML, pictures.

A test asks for a block by words in it, or for all blocks of a document. Which blocks have a test
is seen from these calls (`tests/unit/test_documents.py`), so their arguments are literals.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = tuple(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "bench/*.md", "examples/*.md", "tests/**/*.md")
    for path in sorted(ROOT.glob(pattern))
)
"""All documents, by their paths from the root of the repository."""

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """The language of a fence: ``sh``, ``python``, ``xml`` or ``text``; empty if it has none."""

    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command on one line, and the remark behind it: what it does, or where it is to be run."""

    line: str
    remark: str


def text_of(document: str) -> str:
    """Return all of a document."""
    return (ROOT / document).read_text()


def all_blocks(document: str) -> list[Block]:
    """Return a document's blocks, from top to bottom."""
    return [Block(*found) for found in _FENCED.findall(text_of(document))]


def blocks(document: str, language: str) -> list[str]:
    """Return all blocks of a language; there is one at least."""
    found = [block.text for block in all_blocks(document) if block.language == language]
    assert found, f"{document} has no {language}"
    return found


def block(document: str, words: str) -> str:
    """Return the one block that has these words."""
    found = [block.text for block in all_blocks(document) if words in block.text]
    assert len(found) == 1, f"{len(found)} blocks of {document} have {words!r}"
    return found[0]


def commands(block: str, remark: str | None = None) -> list[str]:
    """Return the commands of a block, those with this remark, or all."""
    return [each.line for each in _taken_apart(block) if remark in (None, each.remark)]


def _taken_apart(block: str) -> Iterator[Command]:
    # Of blocks without here-documents. What continues on the next line is joined.
    for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
        command, _, remark = line.partition(" # ")
        if command.strip() and not command.startswith("#"):
            yield Command(command.rstrip(), remark.strip())


def inline(document: str) -> Iterator[str]:
    """Return what stands between backticks in the document's sentences."""
    for found in re.findall(r"`([^`]+)`", _FENCED.sub("", text_of(document))):
        yield " ".join(found.split())


def said(text: str, instead: Mapping[str, str]) -> str:
    """Put what a test has in the place of what a document says, all of which must be there."""
    for theirs, ours in instead.items():
        assert theirs in text, f"no {theirs!r} in {text!r}"
        text = text.replace(theirs, ours)
    return text


def run(script: str, directory: Path, *, programs: Path | None = None, **variables: str) -> str:
    """Run commands as a user's shell in `directory` would, and return what they print.

    Args:
        script: the commands; the first that fails ends it.
        directory: where.
        programs: where ``ovr`` and ``python`` are; those of the running Python if not said.
        variables: of the environment, besides the usual.

    Raises:
        AssertionError: a command failed; the message has what was said.
    """
    path = f"{programs or Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=directory,
        env={**os.environ, "PATH": path, **variables},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout
