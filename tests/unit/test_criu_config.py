"""CRIU's configuration files in the guest: found by the agent, taken apart as CRIU does, told."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ovr.cli.criu_config import unread_options, words_of
from ovr.errors import AgentUnreachable, AttemptFailed, CriuFailed
from ovr.guest import protocol
from ovr.guest.client.agent import Agent
from tests.unit.agent_host import AgentHost, agent_host
from tests.unit.test_agent_client import frame, peer, replying
from tests.unit.test_criu_options import REPORT, asked, run

__all__ = ["asked"]

FILE = "/etc/criu/default.conf"
OF_CRIUS_MANUAL = r"""$
tcp-established
work-dir "/home/USERNAME/criu/my \"work\" directory"
#this is a comment
no-restore-sibling   # this is another comment
""".removeprefix("$\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            OF_CRIUS_MANUAL,
            ["--tcp-established", "--work-dir", '/home/USERNAME/criu/my "work" directory',
             "--no-restore-sibling"],
        ),
        ("  ghost-limit\t10M\n\n  # none\n", ["--ghost-limit", "10M"]),
        ("external=a#b x#y", ["--external=a#b", "x#y"]),
        ('root ""\nroot "" "a b" c', ["--root", "", "--root", "", "a b", "c"]),
        ('root "never ends', ["--root", '"never', "ends"]),
        ("tcp-close -j --file-locks", ["--tcp-close", "-j", "--file-locks"]),
        ("", []),
    ],
)  # fmt: skip
def test_words_as_crius_parser_has_them(text, words):
    assert list(words_of(text)) == words


@pytest.mark.parametrize(
    ("text", "give", "refused", "unknown"),
    [
        (OF_CRIUS_MANUAL, ["--tcp-established"], [], []),
        ("ghost-limit 10M\nghost-limit=9\n", ["--ghost-limit=10M", "--ghost-limit=9"], [], []),
        # A word after an option that may have a value is none of its: getopt wants a "=".
        ("cpu-cap ins\ncpu-cap=cpu", ["--cpu-cap", "--cpu-cap=cpu"], [], []),
        ("tcp-close\nno-tcp-close", ["--tcp-close", "--no-tcp-close"], [], []),
        ("lazy-pages\naction-script /x y", [], ["--lazy-pages", "--action-script=/x"], []),
        ("no-stream", [], [], []),
        ("shell-j -l", ["--shell-job", "--file-locks"], [], []),
        ("tcp x\nunheard-of 1", [], [], ["--tcp", "--unheard-of"]),
        ("log-file x\nv4\nverbosity=4\nleave-running\ntimeout 9", [], [], ["--v4"]),
        ("root", ["--root="], [], []),
    ],
)  # fmt: skip
def test_what_becomes_of_them(text, give, refused, unknown):
    found = unread_options({FILE: text})
    assert found.paths == (FILE,)
    assert [list(found.give), list(found.refused), list(found.unknown)] == [give, refused, unknown]


def test_what_is_given_need_not_be_told():
    files = {FILE: "tcp-close\nghost-limit 1\nfile-locks\nexternal a b"}
    given = ["--no-tcp-close", "--ghost-limit=2", "--external=c"]
    found = unread_options(files, given)
    assert found.give == ("--file-locks",)
    assert found.fact == f"the guest's {FILE} is not read"
    assert found.cure == "if they are wanted, give ovr restore: --file-locks"


def test_two_files_and_words_for_the_shell():
    files = {FILE: 'root "/a b"\nlazy-pages', "/root/.criu/default.conf": "file-locks\nx;y"}
    found = unread_options(files)
    assert found.fact == f"the guest's {FILE} and /root/.criu/default.conf are not read"
    assert found.cure == (
        "if they are wanted, give ovr restore: '--root=/a b' --file-locks;"
        " ovr cannot honour --lazy-pages; not options of criu restore: '--x;y'"
    )


def test_files_of_an_enemy():
    text = "".join(f"root /{number}\x1b[2J\u2028\n" for number in range(2000))
    found = unread_options({f"{FILE}\n": text})
    assert len(found.cure) < 2000
    assert found.cure.isprintable()
    assert found.fact.isprintable()
    assert "more" in found.cure
    assert unread_options({FILE: "root /a\u2028lazy-pages"}).refused == ()  # one line


def test_a_failing_restore_says_it(asked, capsys):
    _, vm = asked
    vm.error = CriuFailed("criu in the guest failed (1): no", "look there")
    vm.error.unread_config = {FILE: "file-locks"}
    assert run("-W", "work", "-o", "log") == 1
    said = capsys.readouterr().err
    assert f"(look there; the guest's {FILE} is not read: if they are wanted, give" in said
    assert "--file-locks" in said
    assert "--file-locks" in Path("work/log").read_text()


@pytest.mark.parametrize("words", [["--file-locks"], ["--no-default-config"]])
def test_nothing_to_say(asked, capsys, words):
    _, vm = asked
    vm.error = CriuFailed("criu in the guest failed (1): no", "look there")
    vm.error.unread_config = {FILE: "file-locks"}
    assert run(*words) == 1
    assert "(look there)" in capsys.readouterr().err


def test_other_failures_have_nothing_to_do_with_it(asked, capsys):
    _, vm = asked
    vm.error = AttemptFailed("no", "look there")
    assert run() == 1
    assert "(look there)" in capsys.readouterr().err


def test_a_restore_that_succeeds_warns(asked, monkeypatch, capsys):
    report = replace(REPORT, unread_config={FILE: "file-locks"})
    monkeypatch.setattr("tests.unit.test_criu_options.REPORT", report)
    for words, count in (([], 1), (["--no-default-config"], 0)):
        assert run("-W", "work", *words) == 0
        assert capsys.readouterr().err.count(FILE) == count


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / ".criu").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    return home / ".criu" / "default.conf"


def config_of(host: AgentHost):
    with host.connect() as agent:
        found = dict(agent.criu_config())
        agent.ping()
    found.pop(FILE, None)  # of this machine
    return found


def test_the_agent_finds_them(home, tmp_path):
    with agent_host(tmp_path) as host:
        assert config_of(host) == {}
        home.write_bytes(b"file-locks\n\xff\0x\n")
        assert config_of(host) == {str(home): "file-locks\n\ufffd\0x\n"}
        home.write_bytes(b"file-locks\n" + b"x" * 100_000)
        assert config_of(host) == {str(home): "file-locks"}
        home.write_bytes(b"")
        assert config_of(host) == {}
        home.unlink()
        os.mkfifo(home)
        assert config_of(host) == {}
        home.unlink()
        home.mkdir()
        assert config_of(host) == {}


def test_an_agent_that_lies_about_them():
    lie = {"op": "configured", "names": ["a", "b"], "data": [b""]}
    with (
        peer(replying(frame(lie))) as link,
        Agent(link, 5) as agent,
        pytest.raises(AgentUnreachable, match="2 files with 1 contents"),
    ):
        agent.criu_config()
    more = b"\xff" * (protocol.MAX_CONFIG - 2) + b"\nx" + bytes(1 << 17)
    large = {"op": "configured", "names": ["a\nb"], "data": [more]}
    with peer(replying(frame(large))) as link, Agent(link, 5) as agent:
        assert dict(agent.criu_config()) == {"a?b": "\ufffd" * (protocol.MAX_CONFIG - 2)}


@pytest.mark.parametrize("option", ["action-script", "root", "nonsense"])
def test_what_a_guest_writes_does_nothing_to_a_terminal(option):
    """Nor to a log: it cannot begin a line of its own there, or fill it."""
    text = f"{option} \x1b[2J\x07\r\x85(00.0)_Error\n{option}-{'x' * 16_000}"
    cure = unread_options({FILE: text}).cure
    assert cure.isprintable()
    assert len(cure) < 2000
