"""A guest and an agent that lie, once about each thing; `make liar` lies longer."""

import os
from collections.abc import Iterator

import pytest

import ovr
from ovr.errors import RestoreFailed
from ovr.guest import protocol
from tests.liar.proxy import KEPT, LyingAgent
from tests.liar.rounds import WHAT, Liar, Subject
from tests.vm.conftest import PREFIX

SEED = os.environ.get("OVR_LIAR_SEED", "2")


@pytest.fixture
def suite() -> str:
    return "trixie"


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


def test_an_agent_that_lets_nothing_run_is_found_out(vm, dump, tmp_path, monkeypatch):
    """It says that the tree runs, and CRIU still holds it."""
    answer = (protocol.Go, protocol.Restored(dump.pid))
    monkeypatch.setitem(KEPT, "gone without going", answer)
    with (
        LyingAgent(vm.agent, tmp_path / "liar", "gone without going", SEED),
        ovr.attach(f"lab:{vm.name}") as attached,
        pytest.raises(RestoreFailed, match="is still held"),
    ):
        attached.restore(dump.path, agent=f"unix:{tmp_path / 'liar'}:1")
    wait = f"for i in $(seq 300); do test -d /proc/{dump.pid} || exit 0; sleep 0.1; done; exit 1"
    assert vm.sh(wait).status == 0
