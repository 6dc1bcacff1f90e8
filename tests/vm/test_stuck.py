"""The report about a guest in which a test has failed."""

import re

import pytest

import ovr
from tests.stuck import doings


@pytest.fixture
def suite() -> str:
    return "trixie"


def test_what_a_guest_does(vm):
    done = vm.sh("sleep 1000 >/dev/null 2>&1 & echo $!")
    pid = int(done.stdout)
    said = doings(vm)
    vm.sh(f"kill {pid}")
    assert re.search(rf"^{pid} S sleep: .*\bhrtimer_nanosleep\+0x", said, re.M), said
    assert len(re.findall(r"^CPU#0 RIP=\w+ HLT=\d CPU#1 RIP=\w+ HLT=\d$", said, re.M)) == 2
    assert "kthreadd" not in said


def test_a_guest_that_cannot_be_looked_at(vm):
    with ovr.attach(f"lab:{vm.name}"):  # QEMU's monitor serves one
        assert doings(vm).startswith("(")
