"""A guest and an agent that lie, once about each thing; `make liar` lies longer."""

import os
from collections.abc import Iterator

import pytest

from tests.liar.rounds import WHAT, Liar, Subject
from tests.vm.conftest import PREFIX

SEED = os.environ.get("OVR_LIAR_SEED", "2")


@pytest.fixture(scope="module")
def liar(pool, dumps, tmp_path_factory) -> Iterator[Liar]:
    dump = dumps["trixie"]
    subjects = [Subject("", dump.path, dump.pid)]
    scratch = tmp_path_factory.mktemp("liar")
    with Liar(f"{PREFIX}liar", subjects, scratch, pool.get("trixie")) as liar:
        yield liar
        if liar.vm is not None:
            liar.vm.down()  # who knows what it has come to believe


@pytest.mark.parametrize("what", WHAT)
def test_lies(liar, what):
    outcome = liar.round(what, SEED)
    assert not outcome.wrong, outcome
