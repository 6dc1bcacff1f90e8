"""The table: what was recorded, as a document."""

_HEAD = """\
# Namespaces

Made by `make namespaces`; do not edit. Programs that check themselves (`tests/vm/programs/pool/`)
ran in namespaces made by hand (`tests/vm/programs/namespaces/enter.c`), were dumped in one VM, and
were restored into a fresh VM by CRIU alone and by `ovr`. They checked twice that their memory, ids
and id maps, capabilities, limits, names, mounts, interfaces and the clocks of a time namespace
were as before. *all* means every namespace except a user namespace.

Each cell shows CRIU alone, then `ovr`: ✓ means that the program found everything right; ✗ that it
did not, or was not restored, with the number of the reason below. `-` means that this suite's CRIU
did not dump it. Empty cells were not tried.
"""


def render(recorded: dict[str, dict[str, dict[str, str | None]]]) -> str:
    """Return the document; `recorded` has outcomes by suite and case."""
    suites = sorted(recorded)
    names = sorted({name for outcomes in recorded.values() for name in outcomes})
    lines = [_HEAD, _row("namespaces", "program", *suites), _row(*["---"] * (2 + len(suites)))]
    notes: dict[str, None] = {}
    for name in names:
        flavour, _, program = name.rpartition("-")
        cells = [_cell(recorded[suite].get(name), notes) for suite in suites]
        lines.append(_row(flavour.replace("-", "+"), f"`{program}`", *cells))
    reasons = [f"{number}. {text}" for number, text in enumerate(notes, 1)]
    return "\n".join([*lines, "", "The first error of each failure:", "", *reasons]) + "\n"


def _cell(outcome: dict[str, str | None] | None, notes: dict[str, None]) -> str:
    if outcome is None:
        return ""
    if outcome["dump"]:
        return f"- ({_note(outcome['dump'], notes)})"
    marks = []
    for who in ("criu", "ovr"):
        trouble = outcome[who]
        marks.append("✓" if trouble == "" else f"✗ ({_note(trouble or '', notes)})")
    return " ".join(marks)


def _note(text: str, notes: dict[str, None]) -> int:
    plain = text.replace("|", "\\|")
    notes.setdefault(plain)
    return [*notes].index(plain) + 1


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
