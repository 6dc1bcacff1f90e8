"""``ovr states``: list the kinds of state written from outside or left inside, with reasons."""

import argparse
from typing import Any, Final

from ovr.cli.output import document, table
from ovr.state import INSIDE_KINDS, KINDS

__all__ = ["HELP", "MEMORY", "run", "states"]

MEMORY: Final = {
    "name": "memory",
    "outside": True,
    "groups": [],
    "summary": "private and shared memory; `ovr plan` shows the pages and the reasons",
    "source": "CRIU's restorer preads them; do_anonymous_page()",
}


HELP: Final = """\
list all kinds of state, outside or inside, with reasons

List the kinds of state that are written from outside, their groups, and those that are left to the
guest's CRIU, with the reason.

ovr states
"""


def run(options: argparse.Namespace) -> int:
    """List the kinds of state."""
    found = states()
    if options.json:
        document("ovr.states/1", {"states": found})
    else:
        rows = [
            (
                state["name"],
                "yes" if state["outside"] else "no",
                ",".join(state["groups"]) or "-",
                state["summary"] if state["outside"] else state["reason"],
            )
            for state in found
        ]
        table(("STATE", "OUTSIDE", "GROUPS", "DESCRIPTION OR REASON"), rows)
    return 0


def states() -> list[dict[str, Any]]:
    """Return all kinds of state, those written from outside first."""
    yes = [
        {
            "name": kind.name,
            "outside": True,
            "groups": list(kind.groups),
            "summary": kind.summary,
            "source": kind.source,
        }
        for kind in KINDS
    ]
    no = [
        {
            "name": kind.name,
            "outside": False,
            "groups": list(kind.groups),
            "summary": kind.summary,
            "reason": kind.reason,
        }
        for kind in INSIDE_KINDS
    ]
    return [MEMORY, *yes, *no]
