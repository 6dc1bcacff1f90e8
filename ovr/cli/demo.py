"""``ovr demo``: dump and restore a process of lab VMs, or move it, end to end."""

import argparse
import shutil
import sys
from typing import Any, Final

from ovr.cli.output import document, size
from ovr.dump.report import DumpReport
from ovr.lab import demo, demo_move
from ovr.lab.image import SUITES
from ovr.lab.ram import memory_size
from ovr.restore import VERIFY_MODES
from ovr.restore.report import Report

__all__ = ["HELP", "add"]


HELP: Final = """\
dump a process of one lab VM and restore it into another, from outside

Dump a process of one lab VM from outside, end that VM, boot another, restore the process into it
from outside, and let it check itself. With --dump the other VM's own CRIU restores it. With --move
both VMs run, and the process goes on writing to its memory while it is moved.

ovr demo
ovr demo --move
ovr demo --size 5G --memory 8G
ovr demo --dump
ovr demo --suite bookworm --json
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--move", action="store_true", help="move the process while it runs and writes"
    )
    parser.add_argument(
        "--rate", type=int, default=50, metavar="MIB", help="with --move: MiB written a second (50)"
    )
    what.add_argument(
        "--dump", action="store_true", dest="by_criu",
        help="restore by the CRIU of the other VM alone, without ovr",
    )  # fmt: skip
    parser.add_argument("--size", default="1G", metavar="SIZE", help="its memory (1G)")
    parser.add_argument("--memory", default="4G", metavar="SIZE", help="RAM of each VM (4G)")
    parser.add_argument("--umask", default="0137", type=_octal, metavar="OCTAL")
    parser.add_argument("--suite", choices=sorted(SUITES), default="trixie")
    parser.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto")
    parser.add_argument("--verify", choices=VERIFY_MODES, default="sample")


def run(options: argparse.Namespace) -> int:
    """Run the demo and print the result."""
    common: dict[str, Any] = {
        "size": memory_size(options.size), "memory": options.memory, "umask": options.umask,
        "suite": options.suite, "accel": options.accel, "verify": options.verify,
        "say": lambda line: print(f"ovr demo: {line}", file=sys.stderr),
    }  # fmt: skip
    if options.move:
        _show_move(demo_move.run(**common, rate=options.rate), options)
        return 0
    outcome = demo.run(**common, by_criu=options.by_criu)
    if options.json:
        document("ovr.demo.dump/1" if options.by_criu else "ovr.demo/1", outcome.as_json())
        return 0
    answer = outcome.answer
    print(f"It says: {answer.words} words checked, {answer.wrong} wrong, umask {answer.umask}")
    _show("dump", outcome.dumped)
    print(f"  the process was frozen for {outcome.dumped.frozen:.3f} s")
    if outcome.report is not None:
        _show("restore", outcome.report)
    return 0


def _show_move(outcome: demo_move.MoveDemo, options: argparse.Namespace) -> None:
    report, answer = outcome.report, outcome.answer
    if options.json:
        document("ovr.demo.move/1", outcome.as_json())
        return
    print(f"It says: {answer.words} words checked, {answer.wrong} wrong, umask {answer.umask}")
    print(
        f"It did not run for {outcome.gap:.3f} s (± {outcome.gap_error:.3f} s by its clocks);"
        f" ovr says {report.downtime:.3f} s"
    )
    left = report.bytes_outside - report.bytes_ahead
    print(
        f"move: {size(report.bytes_ahead)} copied while it ran, in {len(report.rounds) - 1} rounds,"
        f" {size(left)} while it was stopped, {size(report.bytes_inside)} inside"
    )
    for phase, seconds in report.seconds.items():
        print(f"  {phase:<9}{seconds:8.3f} s  {'█' * _bar(seconds, report.seconds['total'])}")


def _show(what: str, report: Report | DumpReport) -> None:
    share = report.bytes_outside / report.bytes_total
    outside = f"{size(report.bytes_outside)} ({share:.3%}), {report.copy_gb_per_s:.1f} GB/s"
    print(f"{what}: {outside} outside, {size(report.bytes_inside)} inside")
    for phase, seconds in report.seconds.items():
        print(f"  {phase:<9}{seconds:8.3f} s  {'█' * _bar(seconds, report.seconds['total'])}")


def _octal(text: str) -> int:
    return int(text, 8)


def _bar(seconds: float, total: float) -> int:
    width = min(shutil.get_terminal_size().columns, 80) - 30
    return round(width * seconds / total) if total else 0
