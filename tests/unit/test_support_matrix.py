"""docs/support-matrix.md is what its generator makes of the recorded tests."""

import json

import pytest

from ovr.state import KINDS
from tests.kernels.setups import SETUPS, in_turn
from tests.support_matrix import MATRIX, RECORD, kernels, render
from tests.vm.conftest import SUITES


@pytest.fixture
def recorded() -> dict:
    return json.loads(RECORD.read_text())


def test_the_document_is_up_to_date(recorded):
    assert MATRIX.read_text() == render(recorded, kernels()), "python -m tests.support_matrix"


def test_every_kind_is_tested_on_some_guest(recorded):
    tested = {name for guest in recorded.values() for name in guest["kinds"]}
    assert tested == {kind.name for kind in KINDS}


def test_what_was_not_tested_shows(recorded):
    guest = next(iter(recorded.values()))
    text = render({"only": {**guest, "kinds": ["umask"]}})
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "✓" in rows["`umask`"]
    assert "✓" not in rows["`comm`"]


def test_setups_have_names_of_their_own():
    assert len({setup.name for setup in SETUPS}) == len(SETUPS)
    assert {setup.suite for setup in SETUPS} == {*SUITES}
    assert {*kernels()} <= {setup.name for setup in SETUPS}


def test_every_setup_has_its_turn():
    turns = [setup.name for number in range(len(SETUPS)) for setup in in_turn(number)]
    assert turns[:2] == [setup.name for setup in in_turn(0, 2)]
    assert turns[2:4] == [setup.name for setup in in_turn(1, 2)]
    assert turns[0] != turns[1] != turns[2]
    own = {setup.name for setup in SETUPS if not (setup.kernel or setup.machine)}
    others = {setup.name for setup in SETUPS if "/" in setup.kernel}
    reserved = {setup.name for setup in SETUPS if "backend=hugetlbfs" in setup.machine}
    assert {setup.name for setup in SETUPS} - {*turns} == own | others | reserved


def test_kernels_show_with_what_went_wrong():
    outcome = {"kernel": "7.0.13", "criu": "4.1.1", "suite": "trixie", "package": "p|q",
               "machine": "numa=2", "trouble": "",
               "programs": {"cow": "restored", "sysv": "no", "tree": "no", "memfd": "CRIU: x"},
               "without_ovr": ["memfd"]}  # fmt: skip
    text = render({}, {SETUPS[1].name: outcome})
    [row] = [line for line in text.splitlines() if line.startswith("| 7.0.13 ")]
    assert "1 of 4" in row
    assert "`sysv`, `tree`: no" in row
    assert "`memfd`: CRIU: x (CRIU alone fails, too)" in row
    assert f"`{SETUPS[0].name}`" in text.split("Not recorded yet")[1]
