"""``ovr plan``: show what a restore would write outside and leave inside, with reasons."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final

from ovr.checkpoint import Archive
from ovr.cli.output import document, size, table
from ovr.cli.terminal import fitted
from ovr.errors import UsageError
from ovr.images import ImageSet
from ovr.plan import NOT_DUMPED, Plan, make_plan
from ovr.plan.areas import MemoryPlan
from ovr.plan.pages import Reason

__all__ = ["HELP", "add", "add_outside", "show"]


HELP: Final = """\
show what would be restored from outside or inside, with reasons

Read the images and show for every run of pages and every kind of state whether it is written from
outside or left to the guest's CRIU, with the reason. Needs no VM.

ovr plan -D images/
ovr plan -D images/ -v        every run of pages, every value
ovr plan -D images/ --json
ovr plan --archive web.tar.zst
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "-D", "--images-dir", type=Path, metavar="DIR", help="the directory that criu dump wrote"
    )
    source.add_argument(
        "--archive", type=Path, metavar="FILE",
        help="an archive of podman container checkpoint --export or CRI-O",
    )  # fmt: skip
    parser.add_argument(
        "--import-previous", type=Path, dest="previous", metavar="FILE",
        help="the pre-checkpoint on which the archive builds (podman's --with-previous)",
    )  # fmt: skip
    add_outside(parser)


def add_outside(parser: argparse.ArgumentParser) -> None:
    """Add ``--outside``, which `plan` and `restore` share."""
    parser.add_argument(
        "--outside", default="all", metavar="KIND,…", type=lambda text: tuple(text.split(",")),
        help="kinds of state to write from outside and groups of them (see `ovr states`), or all,"
        " the default",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Show the plan."""
    if options.archive is not None:
        with Archive.open(options.archive, options.previous) as archive:
            show(make_plan(archive.images, options.outside), options)
        return 0
    if options.previous is not None:
        raise UsageError("--import-previous needs an archive", "give --archive, too")
    with ImageSet.open(options.images_dir) as images:
        show(make_plan(images, options.outside), options)
    return 0


def show(plan: Plan, options: argparse.Namespace) -> None:
    """Print a plan, in full with ``-v`` or ``--json``."""
    if options.json:
        document("ovr.plan/1", _fields(plan))
        return
    alone = plan.bytes_total - plan.bytes_cow
    share = plan.bytes_outside / alone if alone else 0
    print(f"outside: {size(plan.bytes_outside)} of {size(alone)} ({share:.2%})")
    if plan.bytes_cow:
        print(f"shared copy-on-write by parents and children: {size(plan.bytes_cow)}")
    print(fitted(f"states outside: {', '.join(plan.states) or 'none'}", sys.stdout))
    for task in plan.tasks:
        print(f"\npid {task.task.pid} {task.task.comm!r}, {len(task.task.threads)} threads")
        _show_memory(task, options)
        if lost := plan.not_dumped.get(task.task.pid):
            print(f"  {'lost':<8} {size(lost):>10}  {NOT_DUMPED}")
    for shared in plan.shared:
        print(f"\nshared memory {shared.shared.shmid}, {len(shared.shared.places)} users")
        _show_memory(shared, options)
    if options.verbose and plan.settings:
        print()
        values = [(s.binding.label, s.kind.name, short(s.value)) for s in plan.settings]
        table(("OF", "STATE", "VALUE"), values)


def _show_memory(memory: MemoryPlan, options: argparse.Namespace) -> None:
    for reason, count in sorted(memory.by_reason().items()):
        print(f"  {_where(reason):<8} {size(count):>10}  {reason.text}")
    if options.verbose:
        rows = [(hex(r["start"]), hex(r["end"]), r["where"], r["reason"]) for r in _runs(memory)]
        table(("START", "END", "WHERE", "REASON"), rows)


def _fields(plan: Plan) -> dict[str, Any]:
    return {
        "bytes_total": plan.bytes_total,
        "bytes_outside": plan.bytes_outside,
        "bytes_inside": plan.bytes_total - plan.bytes_outside,
        "bytes_cow": plan.bytes_cow,
        "states": list(plan.states),
        "tasks": [
            {
                "pid": task.task.pid,
                "comm": task.task.comm,
                "threads": list(task.task.threads),
                "runs": list(_runs(task)),
                "bytes_not_dumped": plan.not_dumped.get(task.task.pid, 0),
            }
            for task in plan.tasks
        ],
        "shared": [
            {"shmid": shared.shared.shmid, "runs": list(_runs(shared))} for shared in plan.shared
        ],
        "settings": [
            {"of": setting.binding.label, "state": setting.kind.name, "value": setting.value}
            for setting in plan.settings
        ],
    }


def _runs(memory: MemoryPlan) -> Iterator[dict[str, Any]]:
    for start, length, code in memory.runs[["gva", "size", "reason"]].tolist():
        reason = Reason(code)
        yield {
            "start": start,
            "end": start + length,
            "where": _where(reason),
            "reason": reason.name.lower(),
            "text": reason.text,
        }


def _where(reason: Reason) -> str:
    return "outside" if reason == Reason.OUTSIDE else "inside"
