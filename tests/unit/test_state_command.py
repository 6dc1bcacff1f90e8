"""``ovr states`` and ``ovr plan`` say what goes outside."""

import json

from ovr.cli import main
from ovr.state import INSIDE_KINDS, KINDS


def test_states_as_json(capsys):
    assert main(["states", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "ovr.states/1"
    yes = [state["name"] for state in document["states"] if state["outside"]]
    no = [state["name"] for state in document["states"] if not state["outside"]]
    assert yes == ["memory", *(kind.name for kind in KINDS)]
    assert no == [kind.name for kind in INSIDE_KINDS]
    assert all(state["summary"] for state in document["states"])
    assert all(state["outside"] or state["reason"] for state in document["states"])


def test_states_as_a_table(capsys):
    assert main(["states"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["STATE", "OUTSIDE", "GROUPS"]
    assert len(rows) == 1 + len(KINDS) + len(INSIDE_KINDS)
    assert {row.split()[1] for row in rows} == {"yes", "no"}


def test_the_plan_names_all_values(dumps, capsys):
    command = ["plan", "-D", str(dumps / "uts"), "--outside", "container,comm"]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["states"]) == {"ipc_limits", "nodename", "domainname", "comm"}
    comms = [one["value"] for one in document["settings"] if one["state"] == "comm"]
    assert comms == ["sample", "first", "second"]
    assert main([*command, "-v"]) == 0
    assert "'second'" in capsys.readouterr().out


def test_an_unknown_kind_is_a_usage_error(dumps, capsys):
    assert main(["plan", "-D", str(dumps / "uts"), "--outside", "containers"]) == 2
    assert "`ovr states`" in capsys.readouterr().err
