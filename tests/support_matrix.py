"""Writes docs/support-matrix.md, of the kinds of state and of what the VM tests have recorded.

::

    export OVR_RECORD=1 OVR_ALL=1
    python -m pytest tests/vm/test_states.py tests/vm/test_pool.py tests/vm/test_services.py
    python -m tests.support_matrix

`make kernels` records kernels and machines, and writes the document itself.
"""

import json
from pathlib import Path

from ovr.cli.states import states
from tests.kernels.setups import CANNOT, SETUPS

DOCS = Path(__file__).parents[1] / "docs"
RECORD = DOCS / "support-matrix.json"
KERNELS = DOCS / "kernel-matrix.json"
MATRIX = DOCS / "support-matrix.md"

HEAD = """\
# Support matrix

Made by `python -m tests.support_matrix`; do not edit. `python -m ovr states` lists the same kinds.

A ✓ means that on this guest a process and a tree of three processes, with three threads each, had
an unusual value of that kind of state, were dumped and restored from outside, and found the same
value from within; and that CRIU alone, on the same inside images, restored another value
(`tests/vm/test_states.py`). Memory has a table of its own below. CRIU 3.17 does not dump
`no_new_privs` and ambient capabilities: there the test adds them to the images, in the form of
later versions.

## Written from outside
"""


MEMORY = """\
## Memory

Programs that check themselves (`tests/vm/programs/pool/`) and real services (`tests/vm/services/`)
were dumped in one VM and restored from outside into a fresh one, where they were checked and
continued to work. The percentage is the share of page bytes written outside, not counting bytes
shared copy-on-write; shared memory counts once for each object. *COW* is memory that parents and
children continue to share, counted for each process, in MiB. Other bytes that stay inside follow,
in KiB, by reason. `tests/vm/test_pool.py` also checks that VMA flags, protections, advice and the
figures of smaps are the same as after CRIU alone.
"""


KERNEL_HEAD = """\
## Kernels and machines

`make kernels` boots each of these kernel packages in a lab VM (`--kernel` of `ovr lab up`), starts
the programs of `tests/vm/programs/pool/` there, dumps them with CRIU and restores them from
outside. *restored* counts the programs that found all of their memory and state right afterwards.
Where a program did not come back, CRIU alone was tried on the same images, and the remark says if
that failed, too. RAM is 1 GiB in a file, CPUs have 5-level paging, and the kernel has KASLR,
unless the column *machine* differs. There are fourteen programs; a smaller total means that no
others were run. `make test` takes one of these setups in turn, with four of the programs.
"""


def render(recorded: dict, kernels: dict | None = None) -> str:
    """Return the document.

    Args:
        recorded: by suite, what the VM tests have recorded.
        kernels: by setup, what `tests.kernels` has.
    """
    guests = sorted(
        recorded.values(), key=lambda guest: [*map(_number, guest["kernel"].split("."))]
    )
    titles = [f"Linux {guest['kernel']}, CRIU {guest['criu']}" for guest in guests]
    lines = [
        HEAD,
        _row("state", "groups", "description", *titles),
        _row(*["---"] * (3 + len(guests))),
    ]
    for state in states():
        if state["outside"]:
            tested = [_mark(state["name"], guest["kinds"]) for guest in guests]
            groups = ", ".join(state["groups"])
            lines.append(_row(f"`{state['name']}`", groups, state["summary"], *tested))
    lines += ["", MEMORY, _row("program", "tasks", *titles), _row(*["---"] * (2 + len(guests)))]
    for name in sorted({name for guest in guests for name in guest.get("memory", ())}):
        found = [guest.get("memory", {}).get(name) for guest in guests]
        tasks = next(one["tasks"] for one in found if one)
        lines.append(_row(f"`{name}`", str(tasks), *map(_where, found)))
    lines += ["", *_kernel_rows(kernels or {})]
    lines += ["", "## Left to CRIU", "", _row("state", "description", "reason"), _row(*["---"] * 3)]
    for state in states():
        if not state["outside"]:
            lines.append(_row(f"`{state['name']}`", state["summary"], state["reason"]))
    return "\n".join(lines) + "\n"


def _kernel_rows(kernels: dict) -> list[str]:
    lines = [
        KERNEL_HEAD,
        _row("Linux", "package", "guest", "machine", "restored", "remarks"),
    ]
    lines.append(_row(*["---"] * 6))
    done = [kernels[setup.name] for setup in SETUPS if setup.name in kernels]
    done.sort(key=lambda one: [*map(_number, one["kernel"].split("."))])
    for one in done:
        programs = one["programs"]
        right = sum(said == "restored" for said in programs.values())
        remarks = [one["trouble"], *_remarks(programs, one["without_ovr"])]
        lines.append(
            _row(
                one["kernel"] or "not booted",
                f"`{one['package'] or 'linux-image-cloud-amd64'}`",
                f"{one['suite']}, CRIU {one['criu'] or '?'}",
                one["machine"] or "usual",
                f"{right} of {len(programs)}" if programs else "",
                "; ".join(filter(None, remarks)).replace("|", "\\|").replace("\n", " "),
            )
        )
    missing = [f"`{setup.name}`" for setup in SETUPS if setup.name not in kernels]
    if missing:
        lines += ["", f"Not recorded yet: {', '.join(missing)}."]
    lines += ["", "Not reached:", ""]
    return [*lines, *(f"* {what}: {reason}." for what, reason in CANNOT.items())]


def _remarks(programs: dict[str, str], without_ovr: list[str]) -> list[str]:
    # Programs with the same outcome together.
    by_outcome: dict[tuple[str, bool], list[str]] = {}
    for name, said in sorted(programs.items()):
        if said != "restored":
            by_outcome.setdefault((said, name in without_ovr), []).append(f"`{name}`")
    return [
        f"{', '.join(names)}: {said}" + (" (CRIU alone fails, too)" if alone else "")
        for (said, alone), names in by_outcome.items()
    ]


def _mark(name: str, tested: list[str]) -> str:
    if name == "memory":
        return "see below"
    return "✓" if name in tested else ""


def _where(found: dict | None) -> str:
    if found is None:
        return ""
    sizes = dict(found["bytes"])
    cow = sizes.pop("cow", 0) + sizes.pop("inherited", 0)
    outside = sizes.pop("outside", 0)
    parts = [f"{outside / (outside + sum(sizes.values())):.2%}"]
    if cow:
        parts.append(f"COW {cow / (1 << 20):.0f}")
    parts += [f"{reason} {size >> 10}" for reason, size in sorted(sizes.items())]
    return ", ".join(parts)


def record_memory(suite: str, name: str, tasks: int, bytes_by: dict[str, int]) -> None:
    """Note where the memory of a program or service goes."""
    recorded = json.loads(RECORD.read_text())
    memory = recorded[suite].setdefault("memory", {})
    memory[name] = {"tasks": tasks, "bytes": bytes_by}
    RECORD.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


def kernels() -> dict:
    """Return what `tests.kernels` has recorded, by the name of the setup."""
    return json.loads(KERNELS.read_text()) if KERNELS.exists() else {}


def record_kernel(name: str, outcome: dict) -> None:
    """Note what came of a setup, and write the document."""
    KERNELS.write_text(json.dumps({**kernels(), name: outcome}, indent=1, sort_keys=True) + "\n")
    write()


def write() -> None:
    """Write the document, of all that is recorded."""
    MATRIX.write_text(render(json.loads(RECORD.read_text()), kernels()))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(text: str) -> int:
    digits = text.partition("-")[0].partition("+")[0]
    return int(digits) if digits.isdigit() else 0


if __name__ == "__main__":
    write()
