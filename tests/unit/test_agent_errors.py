"""Errors of the agent as shown to users: hints follow codes, whatever the text is."""

import ast
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ovr.errors import AttemptFailed
from ovr.guest import compiler, protocol
from ovr.guest.client import failures
from ovr.guest.client.agent import Agent
from ovr.guest.client.failures import aborted, failure, refused
from ovr.guest.client.requests import Portion
from ovr.guest.codes import Code
from ovr.guest.protocol import Touching
from tests.unit.agent_host import IMAGES, AgentHost, begin, wait_for

GUEST = Path(compiler.__file__).parent
NO_SPACE = "No space left on device"


@pytest.mark.parametrize("text", ["Kein Speicherplatz", "busy, killed by signal 9", NO_SPACE])
def test_hints_go_by_the_code(text: str) -> None:
    full = refused(protocol.Error(Code.NO_SPACE, text))
    assert "free memory or disk space" in full.hint
    assert full.code == "no-space"
    busy = refused(protocol.Error(Code.BUSY, text))
    assert "other restore" in busy.hint
    other = refused(protocol.Error(Code.TASK, text))
    assert other.hint == "the guest is as it was; try again"
    assert text in str(other)


def test_a_code_that_is_not_known() -> None:
    error = refused(protocol.Error("from\nthe future", "what?"))
    assert error.hint == "the guest is as it was; try again"
    assert error.code == "from?the future"


def test_hints_of_aborts_go_by_the_code() -> None:
    silent = aborted(protocol.Aborted(Code.SILENT, "x", True))
    died = aborted(protocol.Aborted(Code.CRIU, "killed by signal 9", True))
    assert "was ovr stopped" in silent.hint
    assert "OOM" not in died.hint
    assert (silent.code, died.code) == ("silent", "criu")


KILLED = "(00.2) Error (criu/cr-restore.c:1593): 4711 killed by signal 9: Killed"
CAUSE = "(00.1) Error (criu/files-reg.c:2143): File var/x has bad size 1 (expect 2)"


@pytest.mark.parametrize(
    ("log", "oom"),
    [
        ((KILLED,), True), ((KILLED, CAUSE), True), ((CAUSE, KILLED), False), ((CAUSE,), False),
        (("Error: the task said: killed by signal 9",), False),
    ],
)  # fmt: skip
def test_the_oom_killer_is_suspected_where_a_kill_came_first(
    log: tuple[str, ...], oom: bool
) -> None:
    error = failure(protocol.Failed(1, log, True), "criu")
    assert ("OOM killer" in error.hint) is oom
    assert log[0] in str(error)


def test_what_a_real_agent_says(host: AgentHost) -> None:
    said: dict[str, AttemptFailed] = {}

    def keep(what: str, agent: Agent, act: Callable[[], object]) -> None:
        with agent, pytest.raises(AttemptFailed) as caught:
            act()
        said[what] = caught.value

    agent = host.connect()
    keep("nothing to let go", agent, agent.go)
    agent = host.connect()
    keep("a name with a slash", agent, lambda: agent.begin({"a/b": b""}))
    agent = host.connect()
    keep("an engine that is none", agent, lambda: agent.begin(IMAGES, engine="docker"))
    with host.connect() as owner:
        begin(host, owner)
        agent = host.connect()
        keep("a second restore", agent, lambda: begin(host, agent))
        with pytest.raises(AttemptFailed) as caught:
            owner.touch([Portion(1, Touching.DISCARD, [(0, 4096)])])
        said["another's memory"] = caught.value
    wait_for(lambda: not host.restores)
    silent = host.connect()

    def say_nothing() -> None:
        begin(host, silent, silence=0.3)
        silent._outcome(protocol.Restored, time.monotonic() + 30)

    keep("silence", silent, say_nothing)
    assert {what: error.code for what, error in said.items()} == {
        "nothing to let go": Code.IDLE, "a name with a slash": Code.IMAGES,
        "an engine that is none": Code.ENGINE, "a second restore": Code.BUSY,
        "another's memory": Code.TASK, "silence": Code.SILENT,
    }, said  # fmt: skip
    assert "other restore or dump has ended" in said["a second restore"].hint


def test_the_first_error_of_many_is_kept(host: AgentHost) -> None:
    """It is the cause, whatever CRIU says later on."""
    with host.connect() as agent, pytest.raises(AttemptFailed, match="the cause") as caught:
        agent.begin(IMAGES, criu_options=host.criu_options("talkative"))
    (note,) = caught.value.__notes__
    assert len(note.splitlines()) == 16
    assert note.splitlines()[-1].endswith("consequence 99")


def test_every_code_of_the_agent_is_sent_by_it() -> None:
    """One that is sent is in the protocol, else there is no build."""
    source = "".join(path.read_text() for path in sorted(GUEST.glob("*.c")))
    sent = set(re.findall(r"\bCODE_([A-Z_]+)\b", source))
    assert sent == {code.name for code in Code}


def test_no_hint_is_chosen_by_a_sentence() -> None:
    """Only CRIU's log is matched: tables of hints have codes for keys, and no text is searched."""
    tree = ast.parse(Path(failures.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            assert all(isinstance(key, ast.Attribute) for key in node.keys)
        if isinstance(node, ast.Compare):
            assert not any(isinstance(op, ast.In) for op in node.ops)
