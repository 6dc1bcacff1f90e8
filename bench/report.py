"""Tables and figure from `bench/results.json`: ``python -m bench.report``.

Writes between the markers ``<!-- bench NAME -->`` … ``<!-- end -->`` of the documents, and
`docs/restore-time.png`. With ``--check`` nothing is written, and the exit status says whether
anything would be.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.comparison import BARE, COLD, INSIDE, LIMIT, WARM
from bench.outside import PHASES
from bench.results import COMMITTED

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/performance.md")
PICTURE = "docs/restore-time.png"
NAMES = {
    INSIDE: "CRIU inside the VM",
    BARE: "CRIU on bare metal",
    COLD: "`ovr`, cold",
    WARM: "`ovr`, warm",
    LIMIT: "memcpy limit",
}
GOALS = (
    # name, key, whether more is better, limit, format
    ("copy by memcpy limit, 2 MiB pages", f"{COLD}.idle.copy_of_limit", True, 0.9, "{:.2f}"),
    ("copy by memcpy limit, scattered", f"{COLD}.scattered.copy_of_limit", True, 0.8, "{:.2f}"),
    ("cold, idle, against CRIU inside", f"{COLD}.idle.times.{INSIDE}", True, 3, "{:.1f} x"),
    ("warm, idle, against CRIU inside", f"{WARM}.idle.times.{INSIDE}", True, 12, "{:.1f} x"),
    ("warm, idle, against CRIU on bare metal", f"{WARM}.idle.times.{BARE}", True, 20, "{:.1f} x"),
    ("warm, idle, by 2 memcpy limits + 0.2 s", f"{WARM}.idle.of_allowed", False, 1, "{:.2f}"),
    ("warm, loaded, by its own idle time", f"{WARM}.loaded.of_idle", False, 1.3, "{:.2f}"),
    ("warm, loaded, against CRIU inside", f"{WARM}.loaded.times.{INSIDE}", True, 30, "{:.1f} x"),
    ("cold, loaded, against CRIU inside", f"{COLD}.loaded.times.{INSIDE}", True, 6, "{:.1f} x"),
    ("4 KiB translations a second, one core", "walk.per_second", True, 50e6, "{:.2e}"),
    ("host memory beyond mapped files, bytes", "memory.peak_anon", False, 150e6, "{:.2e}"),
    ("plan of 100,000 pagemap entries, seconds", "plan.100000", False, 0.5, "{:.2f}"),
    ("fixed cost, cold, seconds", f"size.{COLD}.fixed", False, 0.5, "{:.2f}"),
    ("fixed cost, warm, seconds", f"size.{WARM}.fixed", False, 0.5, "{:.2f}"),
)  # fmt: skip

Figures = Mapping[str, Mapping[str, Any]]


def median(figures: Figures, key: str) -> float | None:
    """Return a median, or None where there is no figure."""
    found: float | None = figures.get(key, {}).get("median")
    return found


def seconds(figures: Figures, key: str) -> str:
    """Return ``median (min … max)``, or a dash."""
    one = figures.get(key, {})
    if "median" not in one:
        return "-"
    return f"{one['median']:.2f} ({one['min']:.2f} … {one['max']:.2f})"


def restore_table(figures: Figures) -> str:
    """Times of all ways, idle and loaded, and by how much ovr is faster."""
    states = ("idle", "loaded")
    ours = [(name, state) for name in (COLD, WARM) for state in states]
    head = " | ".join(f"{NAMES[name]}, {state}" for name, state in ours)
    lines = [f"| | VM idle, s | VM loaded, s | {head} |", "|---|---:|---:|---:|---:|---:|---:|"]
    for name, shown in NAMES.items():
        cells = [seconds(figures, f"{name}.{state}") for state in states]
        factors = [median(figures, f"{mine}.{state}.times.{name}") for mine, state in ours]
        cells += [f"{factor:.1f} x faster" if factor else "" for factor in factors]
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    notes = [
        f"{NAMES[name]}: {figures[f'{name}.idle']['note']}."
        for name in NAMES
        if "note" in figures.get(f"{name}.idle", {})
    ]
    return "\n".join([*lines, "", "Median (least … most), seconds.", *notes])


def summary_table(whole: Mapping[str, Any]) -> str:
    """Make the README's table: seconds, and factors against CRIU inside, under a caption."""
    figures = whole["figures"]
    lines = [
        f"**{_caption(whole)}**",
        "",
        "| | idle VM, s | loaded VM, s | against CRIU inside, idle | loaded |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, shown in NAMES.items():
        cells = [seconds(figures, f"{name}.{state}") for state in ("idle", "loaded")]
        for state in ("idle", "loaded"):
            factor = median(figures, f"{name}.{state}.times.{INSIDE}")
            cells.append(f"{factor:.1f} x faster" if factor else "")
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _caption(whole: Mapping[str, Any]) -> str:
    # States the accelerator first: figures under TCG say little about KVM.
    about = _run_of(whole)
    if about is None:
        return "Nothing has been measured yet."
    under = {
        "tcg": "guests under software emulation (QEMU's TCG); no figures under KVM yet",
        "kvm": "guests under KVM",
    }[about["accelerator"]]
    return (
        f"Seconds to restore one process with {about['size'] / (1 << 30):.4g} GiB of memory: "
        f"median (least … most) of {about['rounds']} rounds. Measured on {about['cores']} cores of "
        f"{about['cpu']}; {under}."
    )


def phase_table(figures: Figures, runs: Mapping[str, Any]) -> str:
    """Where the time of `ovr` goes; figures of another size are marked."""

    def heading(name: str, state: str) -> str:
        size, usual = (
            runs[figures[f"{one}.memory"]["run"]]["size"]
            for one in (f"{name}.{state}", f"{COLD}.idle")
        )
        other = "" if size == usual else f" ({size / (1 << 30):.3g} GiB)"
        return f"{NAMES[name]}, {state}{other}".replace("`", "")

    columns = [
        (name, state)
        for name in (COLD, WARM)
        for state in ("idle", "loaded", "scattered")
        if f"{name}.{state}.memory" in figures
    ]
    head = " | ".join(heading(name, state) for name, state in columns)
    lines = [f"| phase, s | {head} |", f"|---|{'---:|' * len(columns)}"]
    for phase in ("start", *PHASES, "", "cpu", "held"):
        if not phase:
            cells = [f"**{median(figures, f'{n}.{s}') or 0:.2f}**" for n, s in columns]
            lines.append(f"| **all** | {' | '.join(cells)} |")
            continue
        found = [median(figures, f"{n}.{s}.{phase}") for n, s in columns]
        cells = ["-" if one is None else f"{one:.3f}" for one in found]
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    return "\n".join(lines)


def goal_table(figures: Figures) -> str:
    """Each required number beside the measured one."""
    lines = ["| | wanted | measured | |", "|---|---:|---:|---|"]
    for what, key, more, limit, form in GOALS:
        found = median(figures, key)
        sign = "≥" if more else "≤"
        if found is None:
            lines.append(f"| {what} | {sign} {form.format(limit)} | - | not measured |")
            continue
        reached = found >= limit if more else found <= limit
        word = "yes" if reached else "**no**"
        lines.append(f"| {what} | {sign} {form.format(limit)} | {form.format(found)} | {word} |")
    return "\n".join(lines)


def shape_table(figures: Figures) -> str:
    """Other shapes of the same bytes, as multiples of one area."""
    lines = ["| | one area, s | 10,000 areas | 100 processes |", "|---|---:|---:|---:|"]
    for name in (INSIDE, COLD, WARM):
        one = median(figures, f"shape.one.{name}")
        if one is None:
            continue
        others = [median(figures, f"shape.{shape}.{name}.of_one") for shape in ("areas", "tree")]
        cells = " | ".join("-" if other is None else f"{other:.2f} x" for other in others)
        lines.append(f"| {NAMES[name]} | {one:.2f} | {cells} |")
    if len(lines) == 2:
        return "Not measured."
    return "\n".join(lines)


def _run_of(whole: Mapping[str, Any]) -> Mapping[str, Any] | None:
    # The run of the comparison: size, rounds, machine and versions.
    run = whole["figures"].get(f"{COLD}.idle", {}).get("run")
    found: Mapping[str, Any] | None = whole["runs"].get(run)
    return found


def conditions(whole: Mapping[str, Any]) -> str:
    """Describe the run: memory, rounds, host, guest."""
    about = _run_of(whole)
    if about is None:
        return "Nothing has been measured yet."
    gib = 1 << 30
    return (
        f"{about['size'] / gib:.4g} GiB of memory, {about['rounds']} rounds; host: "
        f"{about['cores']} cores of {about['cpu']}, {about['memory_bytes'] / gib:.0f} GiB, "
        f"Linux {about['kernel']}, QEMU {about['qemu'].split()[0]}; guest: {about['guest']} under "
        f"{about['accelerator'].upper()}, {about['vm_cpus']} vCPUs, "
        f"{about['vm_memory_bytes'] / gib:.1f} GiB, CRIU {about['guest_criu']} "
        f"(on bare metal: {about.get('host_criu', 'none')})."
    )


def filled(text: str, parts: Mapping[str, str]) -> str:
    """Put the parts between their markers."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{parts[match[2]]}\n{match[3]}"

    return re.sub(r"(<!-- bench (\w+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=COMMITTED)
    parser.add_argument("--check", action="store_true")
    return parser.parse_args(arguments)


def main() -> int:
    """Write, or check."""
    options = parse()
    whole = json.loads(options.results.read_text())
    figures = whole["figures"]
    parts = {
        "conditions": conditions(whole),
        "summary": summary_table(whole),
        "restore": restore_table(figures),
        "phases": phase_table(figures, whole["runs"]),
        "goals": goal_table(figures),
        "shapes": shape_table(figures),
    }
    stale = False
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text()
        new = filled(old, parts)
        stale |= new != old
        if not options.check:
            path.write_text(new)
    if not options.check:
        from bench.picture import draw  # noqa: PLC0415 - the tables need no matplotlib

        draw(figures, ROOT / PICTURE)
    return int(stale and options.check)


if __name__ == "__main__":
    sys.exit(main())
