"""``ovr demo``: dump and restore a process on lab VMs, end to end."""

import argparse
import shutil
import sys
from typing import Final

from ovr.cli.output import document, size
from ovr.lab import demo
from ovr.lab.image import SUITES
from ovr.lab.ram import memory_size
from ovr.restore import VERIFY_MODES

__all__ = ["HELP", "add"]


HELP: Final = """\
dump a process in one lab VM, restore it into another from outside

Dump a process in one lab VM, end that VM, boot another, restore the process into it from outside,
and let it check itself.

ovr demo
ovr demo --size 5G --memory 8G
ovr demo --suite bookworm --json
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--size", default="1G", metavar="SIZE", help="its memory (1G)")
    parser.add_argument("--memory", default="4G", metavar="SIZE", help="RAM of each VM (4G)")
    parser.add_argument("--umask", default="0137", type=_octal, metavar="OCTAL")
    parser.add_argument("--suite", choices=sorted(SUITES), default="trixie")
    parser.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto")
    parser.add_argument("--verify", choices=VERIFY_MODES, default="sample")


def run(options: argparse.Namespace) -> int:
    """Run the demo and print the result."""
    outcome = demo.run(
        size=memory_size(options.size), memory=options.memory, umask=options.umask,
        suite=options.suite, accel=options.accel, verify=options.verify,
        say=lambda line: print(f"ovr demo: {line}", file=sys.stderr),
    )  # fmt: skip
    if options.json:
        document("ovr.demo/1", outcome.as_json())
        return 0
    report, answer = outcome.report, outcome.answer
    share = report.bytes_outside / report.bytes_total
    print(f"It says: {answer.words} words checked, {answer.wrong} wrong, umask {answer.umask}")
    print(f"outside: {size(report.bytes_outside)} ({share:.3%}), {report.copy_gb_per_s:.1f} GB/s")
    print(f"inside:  {size(report.bytes_inside)}")
    for phase, seconds in report.seconds.items():
        print(f"  {phase:<9}{seconds:8.3f} s  {'█' * _bar(seconds, report.seconds['total'])}")
    return 0


def _octal(text: str) -> int:
    return int(text, 8)


def _bar(seconds: float, total: float) -> int:
    width = min(shutil.get_terminal_size().columns, 80) - 30
    return round(width * seconds / total) if total else 0
