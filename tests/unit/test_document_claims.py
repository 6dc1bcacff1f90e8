"""Figures and names in documents are those of the code."""

import re
from pathlib import Path

import pytest

from ovr import errors
from ovr.attempt import copier, in_holds, settings
from ovr.guest import protocol
from ovr.images import directory, pagemap
from ovr.kernel.types import live
from ovr.memory.paging import MAX_READ
from tests.documents import DOCUMENTS, ROOT, inline, text_of

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TESTS = sorted(
    {
        (document, name)
        for document in DOCUMENTS
        for name in inline(document)
        if re.fullmatch(r"(tests|bench)/[\w/]+\.py(::\w+)?", name)
    }
)


def defined(source: str, name: str) -> int:
    """A number that is a #define of the agent's."""
    found = re.search(rf"^#define {name} +\(?([\d <]+)", (ROOT / source).read_text(), re.MULTILINE)
    assert found, f"no {name} in {source}"
    value, _, shift = found[1].partition("<<")
    return int(value) << int(shift or 0)


CLAIMS = [
    # document, its words with the figure as a group, and that of the code
    ("docs/safety.md", r"shown to take (\d+) ms \(`HOLD_SECONDS`\)", in_holds.HOLD_SECONDS * 1e3),
    ("docs/safety.md", r"`HOLD_SECONDS`\), (\d+) MiB at most", in_holds.HOLD_BYTES / MIB),
    ("docs/safety.md", r"A page that stays away \((\d+) tries\)", in_holds._TRIES),
    ("docs/safety.md", r"compares (\d+) pages of each target", copier._SAMPLE_PAGES),
    ("docs/safety.md", r"(\d+) pages of each task and each shared object", copier._SAMPLE_PAGES),
    ("docs/safety.md", r"in one hold, which ends after (\d+) ms", settings._HOLD_SECONDS * 1e3),
    ("docs/safety.md", r"exit code (\d)\. *", errors.VerifyMismatch.exit_code),
    ("SECURITY.md", r"An image is at most (\d+) MiB", directory._MAX_READ / MIB),
    ("SECURITY.md", r"a page map (\d+) MiB", pagemap.MAX_PAGEMAP / MIB),
    ("SECURITY.md", r"reads at (\d+) MiB", MAX_READ / MIB),
    ("SECURITY.md", r"changed after (\w+) seconds", {"five": 5.0}),
    ("SECURITY.md", r"Frames of more than (\d+) KiB", protocol.MAX_FRAME / KIB),
    ("SECURITY.md", r"at most (\d+) GiB of image files", protocol.MAX_IMAGE_BYTES / GIB),
    ("SECURITY.md", r"each of (\d+) sessions", defined("ovr/guest/agent.h", "MAX_SESSIONS")),
    (
        "SECURITY.md", r"falls silent for (\d+) s",
        defined("ovr/guest/restore.c", "UPLOAD_SILENCE_MS") / 1e3,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("document", "words", "value"), CLAIMS, ids=[c[1][:40] for c in CLAIMS])
def test_figures(document, words, value):
    text = " ".join(text_of(document).split())
    found = re.findall(words, text, re.IGNORECASE)
    assert found, f"{document} no longer says {words!r}: drop the claim here, too"
    if isinstance(value, dict):
        assert value[found[0]] == live.PATIENCE
    else:
        assert [float(figure) for figure in found] == [pytest.approx(value)] * len(found)


@pytest.mark.parametrize(
    "word", ["usage", "reachable", "restored into", "cannot be restored", "undone"]
)
def test_exit_codes(word):
    """README says each exit code once, in order, and there are no others."""
    text = " ".join(text_of("README.md").split())
    said = re.search(r"exit codes are (0 done.*?)\.", text)
    assert said and word in said[1]
    codes = [int(code) for code in re.findall(r"\b(\d) ", said[1])]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    ours = {kind.exit_code for kind in kinds if issubclass(kind, errors.OvrError)}
    assert codes == sorted({0, *ours})


@pytest.mark.parametrize(("document", "name"), TESTS)
def test_tests_that_documents_name(document, name):
    path, _, function = name.partition("::")
    assert Path(ROOT / path).is_file()
    if function:
        assert f"def {function}(" in (ROOT / path).read_text()
