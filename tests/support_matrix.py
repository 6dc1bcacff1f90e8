"""Writes docs/support-matrix.md, of the kinds of state and of what the VM tests have recorded.

::

    OVR_RECORD=1 python -m pytest tests/vm/test_states.py
    python -m tests.support_matrix
"""

import json
from pathlib import Path

from ovr.cli.states import states

DOCS = Path(__file__).parents[1] / "docs"
RECORD = DOCS / "support-matrix.json"
MATRIX = DOCS / "support-matrix.md"

HEAD = """\
# Support matrix

Made by `python -m tests.support_matrix`; do not edit. `python -m ovr states` lists the same kinds.

A ✓ says that on this guest a process and a tree of three, with three threads each, had an unusual
value of that kind, were dumped and restored from outside, and found it again from within; and that
CRIU alone, on the same inside images, gave another one (`tests/vm/test_states.py`). For memory the
same is shown by `tests/vm/test_restore.py`. CRIU 3.17 does not dump `no_new_privs` and ambient
capabilities: there the test adds them to the images, as later ones have them.

## Written from outside
"""


def render(recorded: dict) -> str:
    """Return the document."""
    guests = sorted(
        recorded.values(), key=lambda guest: [*map(_number, guest["kernel"].split("."))]
    )
    titles = [f"Linux {guest['kernel']}, CRIU {guest['criu']}" for guest in guests]
    lines = [
        HEAD,
        _row("state", "groups", "what it is", *titles),
        _row(*["---"] * (3 + len(guests))),
    ]
    for state in states():
        if state["outside"]:
            tested = [_mark(state["name"], guest["kinds"]) for guest in guests]
            groups = ", ".join(state["groups"])
            lines.append(_row(f"`{state['name']}`", groups, state["summary"], *tested))
    lines += ["", "## Left to CRIU", "", _row("state", "what it is", "why"), _row(*["---"] * 3)]
    for state in states():
        if not state["outside"]:
            lines.append(_row(f"`{state['name']}`", state["summary"], state["reason"]))
    return "\n".join(lines) + "\n"


def _mark(name: str, tested: list[str]) -> str:
    if name == "memory":
        return "see above"
    return "✓" if name in tested else ""


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(text: str) -> int:
    digits = text.partition("-")[0].partition("+")[0]
    return int(digits) if digits.isdigit() else 0


if __name__ == "__main__":
    MATRIX.write_text(render(json.loads(RECORD.read_text())))
