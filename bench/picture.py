"""The figure: all ways to restore, idle and loaded, and how the time grows with the size."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.comparison import BARE, COLD, INSIDE, LIMIT, WARM

Figures = Mapping[str, Mapping[str, Any]]
COLOURS = {INSIDE: "#b3552b", BARE: "#d9a441", COLD: "#2f6f9f", WARM: "#56b4a9", LIMIT: "#8a8a8a"}
LABELS = {
    INSIDE: "CRIU inside the VM",
    BARE: "CRIU on bare metal",
    COLD: "ovr, cold",
    WARM: "ovr, warm",
    LIMIT: "memcpy limit",
}


def draw(figures: Figures, path: Path) -> None:
    """Draw it into a PNG file; the same figures give the same file."""
    mpl.use("Agg")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    _bars(bars, figures)
    _lines(lines, figures)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _bars(axes: Axes, figures: Figures) -> None:
    shown = [
        (state, name)
        for state in ("idle", "loaded")
        for name in LABELS
        if "median" in figures.get(f"{name}.{state}", {})
    ]
    for place, (state, name) in enumerate(shown):
        one = figures[f"{name}.{state}"]
        middle = one["median"]
        spread = [[middle - one["min"]], [one["max"] - middle]]
        axes.barh(place, middle, xerr=spread, color=COLOURS[name], height=0.75, capsize=2)
        axes.text(one["max"] * 1.08, place, f"{middle:.2f} s", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [f"{LABELS[name]}, {state}" for state, name in shown])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel("seconds (median, least … most; logarithmic)")
    axes.set_title("Restoring one process")


def _lines(axes: Axes, figures: Figures) -> None:
    for name, label in LABELS.items():
        found = {
            int(match[1]): one["median"]
            for key, one in figures.items()
            if (match := re.fullmatch(rf"size\.{name}\.(\d+)M", key))
        }
        if found:
            sizes = sorted(found)
            times = [found[size] for size in sizes]
            axes.plot(sizes, times, "o-", color=COLOURS[name], label=label, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("memory of the process, MiB")
    axes.set_ylabel("seconds, VM idle")
    axes.set_title("Time against size")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)
