"""``ovr restore``: the command this tool exists for."""

import argparse
from pathlib import Path
from typing import Any

from ovr.api import attach
from ovr.cli.output import common, document, size
from ovr.cli.plan import add_outside, show
from ovr.cli.vm_options import add_vm_options
from ovr.images import ImageSet
from ovr.plan import make_plan
from ovr.report import Report
from ovr.restore import VERIFY_MODES

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "restore", help="restore images into a running VM, from outside, and let them run"
    )
    parser.add_argument("-D", "--images-dir", type=Path, required=True, metavar="DIR")
    add_vm_options(parser)
    parser.add_argument("--agent", metavar="ADDR", help="where the guest's agent listens")
    add_outside(parser)
    parser.add_argument(
        "--verify", choices=VERIFY_MODES, default="sample",
        help="read back none, a sample or all of the memory before the tree may run",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check and show the plan only")
    common(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Restore, or with ``--dry-run`` go as far as is possible without touching the guest."""
    if options.dry_run:
        return _dry_run(options)
    with attach(options.vm, vmlinux=options.vmlinux) as vm:
        report = vm.restore(
            options.images_dir, agent=options.agent, outside=options.outside, verify=options.verify
        )
    if options.json:
        document("ovr.restore/1", report.as_json())
    else:
        print(_sentence(report))
    return 0


def _dry_run(options: argparse.Namespace) -> int:
    with attach(options.vm, vmlinux=options.vmlinux), ImageSet.open(options.images_dir) as images:
        plan = make_plan(images, options.outside)
        plan.inside_images()
        show(plan, options)
    return 0


def _sentence(report: Report) -> str:
    return (
        f"restored pid {report.pid} ({report.tasks} tasks, {size(report.bytes_outside)} of "
        f"{size(report.bytes_total)} from outside) in {report.seconds['total']:.3f} s; "
        f"VM held {report.held['seconds'] * 1e3:.0f} ms, at most "
        f"{report.held['longest'] * 1e3:.0f} ms at once"
    )
