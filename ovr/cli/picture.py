"""Draw a restore or a dump as one HTML file.

It shows the time of each phase and hold, and where the bytes went. Without scripts and external
resources, so it can be mailed and opened anywhere.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from html import escape
from pathlib import Path
from typing import Final

from ovr.attempt.stopwatch import Span
from ovr.cli.output import one_line, size
from ovr.dump.report import DumpReport
from ovr.errors import UsageError
from ovr.host import Replacement, cure_of, locate
from ovr.plan.pages import Reason
from ovr.restore.report import Report

__all__ = ["Writer", "draw", "page", "picture_file"]

log = logging.getLogger("ovr.report")

_WIDTH: Final = 860
_LABELS: Final = 90
"""Width in pixels of the column with the names of rows."""
_ROW: Final = 26
_TICKS: Final = 6
_HELD: Final = "VM held"

_STYLE: Final = """\
:root { --ink: #1d2430; --dim: #667080; --line: #d9dee6; --paper: #ffffff;
  --bar: #2f6fb7; --held: #c2571a; --b0: #2f6fb7; --b1: #6aa84f; --b2: #d9a441; --b3: #9a6fb0;
  --b4: #c2571a; --b5: #4aa3a3; --b6: #8c8c8c; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --dim: #98a2b3; --line: #3a4250;
  --paper: #161a20; --bar: #5b9be0; --held: #e5854a; --b0: #5b9be0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 900px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.05rem; margin-top: 2rem; }
p, footer { color: var(--dim); margin-top: .2rem; }
svg { width: 100%; height: auto; } svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
svg .dim { fill: var(--dim); } svg line { stroke: var(--line); } svg .bar { fill: var(--bar); }
svg .held { fill: var(--held); }
table { border-collapse: collapse; width: 100%; } td, th { padding: .2rem .6rem .2rem 0;
  border-bottom: 1px solid var(--line); text-align: left; } .n { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
i { display: inline-block; width: .8em; height: .8em; margin-right: .5em; }
"""


@contextmanager
def picture_file(path: Path) -> Iterator["Writer"]:
    """Open a file for the body of the ``with``, which replaces `path` when it is written.

    Raises:
        UsageError: it cannot be made.
    """
    with ExitStack() as stack:
        try:
            directory, name = locate(path)
            stack.enter_context(directory)
            writer = Writer(stack.enter_context(directory.replacement(name, in_place=True)))
        except OSError as error:
            hint = cure_of(error, "name another path for it")
            reason = error.strerror or str(error)
            raise UsageError(f"the report {path} cannot be made: {reason}", hint) from error
        yield writer


class Writer:
    """A file that is written atomically."""

    def __init__(self, file: Replacement) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """Write `text` as the file's content.

        Raises:
            OSError: the disk is full, or fails.
        """
        self._file.file.write(text.encode())
        self._file.put()


def draw(
    picture: Writer, report: Report | DumpReport, path: Path, *, images: Path | None, vm: str
) -> None:
    """Write the page of a report; a failure is logged, since the work itself is done.

    Args:
        picture: the open file.
        report: the result.
        path: the file's path.
        images: the images' directory or archive; None: the current directory.
        vm: the VM's name on the command line.
    """
    try:
        picture.write(page(report, {"images": str(images or "."), "VM": vm}))
    except OSError as error:
        log.warning("no report in %s: %s", path, error.strerror)


def page(report: Report | DumpReport, facts: Mapping[str, str]) -> str:
    """Return the HTML page.

    Args:
        report: the result.
        facts: further facts by name: the images' directory, the VM.
    """
    from importlib.metadata import version  # noqa: PLC0415 - slow to load, and rarely used

    total = report.seconds.get("total", 0.0)
    done = "restored" if isinstance(report, Report) else "dumped"
    title = f"pid {report.pid}: {size(report.bytes_total)} {done} in {_seconds(total)}"
    about = " · ".join(f"{escape(k)} {escape(one_line(v))}" for k, v in facts.items())
    body = (
        f"<h1>{escape(title)}</h1>\n<p>{about}</p>\n"
        f"<h2>When</h2>\n{_timeline(report)}\n{_phases(report)}"
        f"<h2>Where the bytes went</h2>\n{_bytes(_pages(report))}"
        f"{_states(report)}"
        f"<footer>ovr {escape(version('ovr'))}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}</footer>\n"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>ovr: {escape(title)}</title>\n<style>\n{_STYLE}</style>\n{body}</html>\n"
    )


def _pages(report: Report | DumpReport) -> Mapping[str, int]:
    # The bytes of each sort of pages, by its description.
    if isinstance(report, Report):
        return {Reason[name.upper()].text: count for name, count in report.reasons.items()}
    return {"read from outside": report.bytes_outside, "written by CRIU": report.bytes_inside}


def _states(report: Report | DumpReport) -> str:
    if not isinstance(report, Report):
        return ""
    states = escape(", ".join(report.states) or "none")
    return f"<h2>State written from outside</h2>\n<p>{states}</p>\n"


def _timeline(report: Report | DumpReport) -> str:
    # One row for each phase, in the order in which they began, and one for the holds.
    rows: dict[str, list[Span]] = {}
    for span in report.spans:
        rows.setdefault(span.name, []).append(span)
    rows[_HELD] = [*report.holds]
    end = max([report.seconds.get("total", 0.0), *(s.end for s in report.spans)]) or 1.0
    scale = (_WIDTH - _LABELS) / end
    height = _ROW * len(rows)
    parts = [*_axis(end, scale, height)]
    for number, (name, spans) in enumerate(rows.items()):
        top = number * _ROW
        parts.append(f'<text x="0" y="{top + 17}">{escape(name)}</text>')
        parts += _bars(spans, scale, top, "held" if name == _HELD else "bar")
    label = escape(", ".join(f"{k} {_seconds(v)}" for k, v in report.seconds.items()))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height + 24}" role="img" aria-label="{label}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _axis(end: float, scale: float, height: int) -> Iterator[str]:
    step = _step(end)
    for n in range(int(end / step) + 1):
        x = _LABELS + n * step * scale
        anchor = "end" if x > _WIDTH - 20 else "middle"
        yield f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height}"/>'
        yield (
            f'<text class="dim" x="{x:.1f}" y="{height + 17}" text-anchor="{anchor}">'
            f"{n * step:g} s</text>"
        )


def _step(end: float) -> float:
    # A round number of seconds that yields about `_TICKS` ticks.
    magnitude = 1e-6
    while magnitude * 10 <= end / _TICKS:
        magnitude *= 10
    return next(magnitude * f for f in (1, 2, 5, 10) if magnitude * f >= end / _TICKS)


def _bars(spans: Sequence[Span], scale: float, top: int, kind: str) -> Iterator[str]:
    for span in spans:
        x, width = _LABELS + span.start * scale, max((span.end - span.start) * scale, 0.5)
        tip = f"{span.name}: {_seconds(span.end - span.start)} from {_seconds(span.start)} on"
        yield (
            f'<rect class="{kind}" x="{x:.1f}" y="{top + 5}" width="{width:.1f}"'
            f' height="{_ROW - 10}"><title>{escape(tip)}</title></rect>'
        )


def _phases(report: Report | DumpReport) -> str:
    total = report.seconds.get("total", 0.0)
    rows = [
        (name, _seconds(seconds), f"{seconds / total:.0%}" if total else "")
        for name, seconds in report.seconds.items()
    ]
    held = report.held
    if held:
        text = f"{held['count']:g} times, at most {_seconds(held['longest'])} at once"
        rows.append((f"{_HELD}, {text}", _seconds(held["seconds"]), ""))
    return _table(("Phase", "Time", "Share"), [(escape(name), *rest) for name, *rest in rows])


def _bytes(pages: Mapping[str, int]) -> str:
    whole = sum(pages.values())
    colours = {name: f"var(--b{n % 7})" for n, name in enumerate(pages)}
    x, parts = 0.0, []
    for name, count in pages.items():
        width = count / whole * _WIDTH if whole else 0.0
        parts.append(
            f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="22" style="fill:{colours[name]}">'
            f"<title>{escape(name)}: {size(count)}</title></rect>"
        )
        x += width
    rows = [
        (
            f'<i style="background:{colours[name]}"></i>{escape(name)}',
            size(count), f"{count / whole:.2%}" if whole else "",
        )
        for name, count in pages.items()
    ]  # fmt: skip
    bar = f'<svg viewBox="0 0 {_WIDTH} 22" aria-hidden="true">\n' + "\n".join(parts) + "\n</svg>\n"
    return bar + _table(("Pages", "Size", "Share"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # The cells are HTML; all but the first are numbers.
    def line(cells: Sequence[str], tag: str) -> str:
        first, *rest = cells
        more = "".join(f'<{tag} class="n">{cell}</{tag}>' for cell in rest)
        return f"<tr><{tag}>{first}</{tag}>{more}</tr>"

    lines = [line(head, "th"), *(line(row, "td") for row in rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>\n"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
