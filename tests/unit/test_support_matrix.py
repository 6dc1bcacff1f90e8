"""docs/support-matrix.md is what its generator makes of the recorded tests."""

import json

import pytest

from ovr.state import KINDS
from tests.support_matrix import MATRIX, RECORD, render


@pytest.fixture
def recorded() -> dict:
    return json.loads(RECORD.read_text())


def test_the_document_is_up_to_date(recorded):
    assert MATRIX.read_text() == render(recorded), "python -m tests.support_matrix"


def test_every_kind_is_tested_on_some_guest(recorded):
    tested = {name for guest in recorded.values() for name in guest["kinds"]}
    assert tested == {kind.name for kind in KINDS}


def test_what_was_not_tested_shows(recorded):
    guest = next(iter(recorded.values()))
    text = render({"only": {**guest, "kinds": ["umask"]}})
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "✓" in rows["`umask`"]
    assert "✓" not in rows["`comm`"]
