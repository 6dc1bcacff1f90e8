"""Failures of a setup in `make kernels`."""

import pytest

from tests.kernels.__main__ import chosen, parse
from tests.kernels.run import RESTORED, Outcome, _cause
from tests.kernels.setups import SETUPS


@pytest.mark.parametrize(
    ("outcome", "failed"),
    [
        (Outcome(programs={"cow": RESTORED}), False),
        (Outcome(programs={"cow": RESTORED, "tree": "it finds itself changed"}), True),
        (Outcome(programs={"cow": RESTORED, "tree": "x"}, without_ovr=["tree"]), False),
        (Outcome(programs={"cow": RESTORED}, trouble="WARNING: at kernel/x.c"), True),
        (Outcome(), True),  # nothing was tried
    ],
)
def test_failed(outcome, failed):
    assert outcome.failed == failed


def test_the_cause_is_one_line():
    log = "criu: x\n(00.1) Warn  (a.c:1): no\n(00.2) Error (criu/b.c:2): Can't dump\nmore"
    assert _cause(AssertionError(log)) == "Error (criu/b.c:2): Can't dump"
    assert _cause(AssertionError("one\ntwo")) == "one"
    assert _cause(AssertionError()) == "AssertionError()"


def test_setups_by_name_or_by_words():
    every = [setup.name for setup in SETUPS]
    assert [setup.name for setup in chosen(parse([]))] == every
    exact = "trixie linux-image-cloud-amd64"
    assert [setup.name for setup in chosen(parse(["--only", exact]))] == [exact]
    some = chosen(parse(["--only", "trixie numa=2", "--only", "forky"]))
    assert {setup.suite for setup in some} == {"trixie", "forky"}
    assert all("numa=2" in setup.name for setup in some if setup.suite == "trixie")
