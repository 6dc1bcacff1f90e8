"""A guest and an agent that lie, once about each thing; `make liar` lies longer."""

import os
from collections.abc import Iterator

import pytest

import ovr
from ovr.errors import AttemptFailed
from ovr.guest import protocol
from tests.liar.proxy import KEPT, LyingAgent
from tests.liar.rounds import WHAT, Liar, Subject, gone
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


@pytest.mark.parametrize(
    "lie", [(0, "is still held"), (1, "but the skeleton was pid")], ids=["held", "another pid"]
)
def test_an_agent_that_lets_nothing_run(vm, dump, tmp_path, monkeypatch, lie):
    """It says that the tree runs, or another one, and CRIU still holds it."""
    off, found_out = lie
    answer = (protocol.Go, protocol.Restored(dump.pid + off))
    monkeypatch.setitem(KEPT, "gone without going", answer)
    with (
        LyingAgent(vm.agent, tmp_path / "liar", "gone without going", SEED),
        ovr.attach(f"lab:{vm.name}") as attached,
        pytest.raises(AttemptFailed, match=found_out),
    ):
        attached.restore(dump.path, agent=f"unix:{tmp_path / 'liar'}:1")
    assert gone(vm, Subject("", dump.path, dump.pid).comm)
