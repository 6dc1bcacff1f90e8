"""``ovr move``: its command line, its decisions, its results."""

import argparse
import json
import logging
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

import ovr
from ovr import cli
from ovr.cli import demo, move
from ovr.dump import AS_MANY_AS_HELP
from ovr.dump.precopy import Round
from ovr.errors import AttemptFailed, CriuFailed, MoveInDoubt
from ovr.guest.client.results import Outcome
from ovr.lab.demo import Answer
from ovr.lab.demo_move import MoveDemo
from ovr.move import MoveReport
from tests.documents import block, commands

ID, OTHER = "a1" * 16, "b2" * 16
HELD = {"count": 3, "seconds": 0.02, "longest": 0.01, "by": "ptrace"}
MOVED = MoveReport(
    move=ID, pid=4711, tasks=2, bytes_total=12345 * 4096, bytes_outside=12000 * 4096,
    bytes_inside=345 * 4096, bytes_ahead=11000 * 4096, bytes_copied=15000 * 4096,
    rounds=(Round(14000 * 4096, 1.0, 0.0), Round(0, 0.01, 0.002)), downtime=0.25,
    verified="sample", bytes_verified=8192 * 4096, skeleton="warm",
    seconds={"ahead": 1.0, "total": 1.5}, held={"source": HELD, "destination": HELD},
)  # fmt: skip


class SourceAgent:
    """The agent of a VM with moves in doubt."""

    def __init__(self, doubts):
        self.in_doubt = doubts
        self.hello = SimpleNamespace(boot_id="of the source")
        self.told = []

    def doubts(self):
        return self.in_doubt

    def adopt(self, name):
        self.told.append(("adopt", name))

    def end_dump(self):
        self.told.append("end")

    def abort(self):
        self.told.append("abort")


class DestinationAgent:
    """The agent of a VM to which trees were moved."""

    def __init__(self):
        self.outcome = Outcome(released=True, held=False)
        self.hello = SimpleNamespace(boot_id="of the destination")
        self.asked = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def moved(self, name):
        self.asked.append(name)
        return self.outcome


class Host:
    """VMs that need none: the calls that the command makes, and their agents."""

    def __init__(self):
        self.attached = []
        self.moves = []
        self.error = None
        self.source = SourceAgent((ID,))
        self.destination = DestinationAgent()

    def attach(self, spec, **options):
        self.attached.append((spec, options.get("vmlinux")))
        return Vm(self, spec)


class Vm:
    kernel = qmp = None

    def __init__(self, host, spec):
        self.host = host
        self.spec = spec
        self.ram = argparse.Namespace(slots=())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def move(self, pid, to, **options):
        self.host.moves.append((self.spec, pid, to.spec, options))
        logging.getLogger("ovr.move").info("in the middle")
        if self.host.error:
            raise self.host.error
        return MOVED


class Attempt:
    def __init__(self, vm, address):
        self.agent = vm.host.source

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def host(monkeypatch, tmp_path):
    found = Host()
    monkeypatch.setattr(move, "attach", found.attach)
    monkeypatch.setattr(move, "AttachedVm", found.attach)
    monkeypatch.setattr(move, "Attempt", Attempt)
    monkeypatch.setattr(move, "agent_address", lambda vm, given: given or "vsock:4")
    monkeypatch.setattr(move.Agent, "connect", lambda address: found.destination)
    monkeypatch.setattr(move, "check_same_guest", lambda *_: None)
    monkeypatch.setattr(move, "authenticate_alone", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    return found


def run(*words):
    return cli.main(["move", "--from", "qmp:/a", "--to", "qmp:/b", *words])


def decide(*words):
    return cli.main(["move", "--from", "qmp:/a", *words])


def code_of(capsys):
    """Return the code of the error that was printed as JSON."""
    error = json.loads(capsys.readouterr().out)
    assert error["schema"] == "ovr.error/1"
    return error["code"]


def test_options_are_arguments_of_the_move(host, capsys):
    words = "-t 4242 --from-agent vsock:3 --to-agent vsock:4 --from-vmlinux a --to-vmlinux b"
    words += " --rounds 3 --downtime 1.5s --strict --verify full --ignore-cpu --timeout 9 -v4 -j"
    words += " --tcp-established"
    words += " --external mnt[]:m"
    assert run(*words.split()) == 0
    assert host.attached == [("qmp:/a", Path("a")), ("qmp:/b", Path("b"))]
    [(source, pid, destination, options)] = host.moves
    assert (source, pid, destination) == ("qmp:/a", 4242, "qmp:/b")
    assert options == {
        "agent": "vsock:3", "to_agent": "vsock:4", "rounds": 3, "downtime": 1.5,
        "strict": True, "verify": "full",
        "check_cpu": False, "log_level": 4, "timeout": 9.0,
        "criu_options": ["--shell-job", "--tcp-established", "--external=mnt[]:m"],
        "engine_options": [],
    }  # fmt: skip
    out = capsys.readouterr().out
    assert out.startswith("moved pid 4711 from qmp:/a to qmp:/b (2 tasks, 48.2 MiB)")
    assert out.endswith("down for 0.250 s\n")


def test_a_container(host):
    assert run("--container", "web", "--file-locks", "--", "--ignore-volumes") == 0
    [(_, tree, destination, options)] = host.moves
    assert (tree, destination) == ("web", "qmp:/b")
    assert options["criu_options"] == ["--file-locks"]
    assert options["engine_options"] == ["--ignore-volumes"]


def test_a_container_and_a_process(host):
    assert run("--container", "web", "-t", "4242") == 2
    assert not host.moves


def test_what_is_not_asked_for(host):
    assert run("-t", "4242") == 0
    assert host.attached == [("qmp:/a", None), ("qmp:/b", None)]
    assert host.moves[0][3] == {
        "agent": None, "to_agent": None, "rounds": AS_MANY_AS_HELP, "downtime": 0.3,
        "strict": False, "verify": "sample",
        "check_cpu": True, "log_level": 2, "timeout": None, "criu_options": [],
        "engine_options": [],
    }  # fmt: skip


def test_the_result_as_json(host, capsys):
    assert run("-t", "4242", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"schema": "ovr.move/1", **json.loads(json.dumps(MOVED.as_json()))}
    assert (found["move"], found["bytes_ahead"]) == (ID, 11000 * 4096)
    assert [one["size"] for one in found["rounds"]] == [14000 * 4096, 0]


@pytest.mark.parametrize("what", ["-t 7", "--finish", "--back"])
def test_a_vm_is_not_both_sides(host, capsys, what):
    assert cli.main(f"move {what} --from pid:7 --to pid:7 --json".split()) == 2
    assert code_of(capsys) == "same-vm"


@pytest.mark.parametrize(
    "words",
    [
        "--from qmp:/a --to qmp:/b",
        "--from qmp:/a -t 5",
        "--from qmp:/a --to qmp:/b -t 0",
        "--from qmp:/a --to qmp:/b -t x",
        f"--from qmp:/a --to qmp:/b -t 5 --id {ID}",
        "--from qmp:/a --finish",
        "--from qmp:/a --to qmp:/b --finish -t 5",
        "--from qmp:/a --back -t 5",
    ],
)
def test_no_vm_is_attached_to_for_a_wrong_command_line(host, capsys, words):
    assert cli.main(["move", *words.split(), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["kind"] == "UsageError"
    assert host.attached == []


@pytest.mark.parametrize(
    "words",
    [
        "-t 5",
        "-t 5 --from qmp:/a --to qmp:/b --rounds 0",
        "-t 5 --from qmp:/a --to qmp:/b --rounds many",
        "-t 5 --from qmp:/a --to qmp:/b --downtime 300",
        "-t 5 --from qmp:/a --to qmp:/b --downtime soon",
        "-t 5 --from qmp:/a --to qmp:/b --verify some",
        "-t 5 --from qmp:/a --to qmp:/b --lazy-pages",
        "-t 5 --from qmp:/a --to qmp:/b -D images",
        "--from qmp:/a --to qmp:/b --finish --back",
    ],
)
def test_what_the_parser_refuses(host, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(["move", *words.split()])
    assert caught.value.code == 2
    assert host.attached == []


def test_a_move_in_doubt(host, capsys):
    host.error = MoveInDoubt("it is not known", "decide it", ID)
    assert run("-t", "4242", "--json") == 9
    error = json.loads(capsys.readouterr().out)
    assert (error["code"], error["move"], error["exit_code"]) == ("in-doubt", ID, 9)


def test_an_error_that_leaves_nothing_in_doubt(host, capsys):
    host.error = AttemptFailed("no")
    assert run("-t", "4242", "--json") == 1
    assert json.loads(capsys.readouterr().out)["move"] == ""


def test_the_log(host, capsys):
    assert run("-t", "4242", "-o", "move.log", "-v4") == 0
    assert "move: in the middle" in Path("move.log").read_text()
    assert "in the middle" not in capsys.readouterr().err


def test_the_log_has_the_error_and_what_criu_says(host):
    host.error = CriuFailed("criu in the guest failed (1): no", "look there")
    host.error.add_note("(00.1) Error (criu/x.c:1): no")
    assert run("-t", "4242", "-o", "move.log") == 1
    lines = Path("move.log").read_text().splitlines()
    assert "guest: (00.1) Error (criu/x.c:1): no" in lines[0]
    assert "criu in the guest failed (1): no (look there)" in lines[1]
    assert lines[-1].endswith("Moving FAILED.")


def test_a_log_that_cannot_be_made(host):
    assert run("-t", "4242", "-o", "nowhere/move.log") == 2
    assert host.attached == []


@pytest.mark.parametrize(
    ("word", "done", "told"), [("--finish", "finished", "end"), ("--back", "taken back", "abort")]
)
def test_a_decision(host, capsys, word, done, told):
    host.destination.outcome = Outcome(released=word == "--finish", held=False)
    assert decide("--to", "qmp:/b", word) == 0
    assert host.destination.asked == [ID]
    assert host.source.told == [("adopt", ID), told]
    assert not host.moves
    where = "qmp:/b" if word == "--finish" else "qmp:/a"
    assert capsys.readouterr().out == f"move {ID} was {done}: {where} has the tree\n"
    assert decide("--to", "qmp:/b", word, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"schema": "ovr.move.decided/1", "move": ID, "decision": done}


def test_back_from_a_vm_that_is_gone(host):
    assert decide("--back") == 0
    assert host.attached == [("qmp:/a", None)]
    assert host.source.told == [("adopt", ID), "abort"]
    assert host.destination.asked == []


@pytest.mark.parametrize(
    ("word", "outcome", "code"),
    [
        ("--finish", Outcome(released=False, held=False), "not-released"),
        ("--back", Outcome(released=True, held=False), "released"),
        ("--finish", Outcome(released=False, held=True), "held"),
        ("--back", Outcome(released=False, held=True), "held"),
    ],
)
def test_the_destination_contradicts(host, capsys, word, outcome, code):
    host.destination.outcome = outcome
    assert decide("--to", "qmp:/b", word, "--json") == 4
    assert code_of(capsys) == code
    assert host.source.told == []


@pytest.mark.parametrize(
    ("doubts", "words"), [((), ["--back"]), ((OTHER,), ["--back", "--id", ID])]
)
def test_no_such_move_is_in_doubt(host, capsys, doubts, words):
    host.source.in_doubt = doubts
    assert decide("--json", *words) == 2
    assert code_of(capsys) == "no-doubt"
    assert host.source.told == []


def test_one_of_several_is_named(host, capsys):
    host.source.in_doubt = (ID, OTHER)
    assert decide("--back", "--json") == 2
    assert json.loads(capsys.readouterr().out)["kind"] == "UsageError"
    assert host.source.told == []
    assert decide("--back", "--id", OTHER) == 0
    assert host.source.told == [("adopt", OTHER), "abort"]


def demo_of(*words):
    parser = argparse.ArgumentParser()
    demo.add(parser)
    parser.add_argument("--json", action="store_true")
    return demo.run(parser.parse_args(words))


def test_the_demo_of_a_move(monkeypatch, capsys):
    asked = []
    answer = Answer(4711, 1 << 21, 0, -1, "0137", written=7, before=1.0, after=1.3)

    def moved(**options):
        asked.append(options)
        return MoveDemo(MOVED, answer, gap=0.3, gap_error=0.001, size=1 << 24, umask=0o137)

    monkeypatch.setattr(demo.demo_move, "run", moved)
    assert demo_of("--move", "--rate", "20", "--size", "16M") == 0
    assert (asked[0]["rate"], asked[0]["size"]) == (20, 1 << 24)
    out = capsys.readouterr().out
    assert "It did not run for 0.300 s (± 0.001 s by its clocks); ovr says 0.250 s" in out
    assert "in 1 rounds" in out
    assert demo_of("--move", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "ovr.demo.move/1"
    assert (found["verified"], found["gap"], found["downtime"]) == (True, 0.3, 0.25)


def test_the_document_moves(host, monkeypatch):
    """Its command and its program do the same."""
    [line] = commands(block("docs/move.md", "ovr move -t"))
    assert cli.main(shlex.split(line)[1:]) == 0
    monkeypatch.setattr(ovr, "attach", host.attach)
    exec(block("docs/move.md", "import ovr"), {})
    assert host.attached == 2 * [("libvirt:vm-a", None), ("libvirt:vm-b", None)]
    by_command, by_program = ((*move[:3],) for move in host.moves)
    assert by_command == by_program == ("libvirt:vm-a", 4242, "libvirt:vm-b")


def test_the_document_decides(host):
    finish, back, gone = commands(block("docs/move.md", "ovr move --finish"))
    assert cli.main(shlex.split(finish)[1:]) == 0
    assert cli.main(shlex.split(back)[1:]) == 4
    host.destination.outcome = Outcome(released=False, held=False)
    assert cli.main(shlex.split(back)[1:]) == 0
    assert cli.main(shlex.split(gone)[1:]) == 0
    assert host.source.told == [("adopt", ID), "end", *2 * [("adopt", ID), "abort"]]
    assert host.destination.asked == 3 * [ID]


def test_the_readme_moves(host):
    for line in commands(block("README.md", "ovr move  "))[-2:]:
        assert cli.main(shlex.split(line)[1:]) == 0
    assert [move[:3] for move in host.moves] == [
        ("libvirt:vm-a", tree, "libvirt:vm-b") for tree in (4242, "web")
    ]


def test_the_document_moves_a_container(host):
    [line] = commands(block("docs/move.md", "ovr move --container"))
    assert cli.main(shlex.split(line)[1:]) == 0
    assert host.moves[0][:3] == ("libvirt:vm-a", "web", "libvirt:vm-b")
