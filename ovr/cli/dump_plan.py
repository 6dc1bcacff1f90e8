"""Show the plan of a dump: ``ovr dump --dry-run``."""

import argparse
from typing import Any, Final

from ovr.cli.output import document, one_line, size, table
from ovr.dump.plan import DumpPlan, Reason, TaskPlan

__all__ = ["show"]

_SWAPPED: Final = "in swap, about: read back when it is dumped"


def show(plan: DumpPlan, options: argparse.Namespace) -> None:
    """Print a plan, in full with ``-v`` or ``--json``."""
    if options.json:
        document("ovr.dump.plan/1", _fields(plan))
        return
    share = plan.bytes_outside / plan.bytes_total if plan.bytes_total else 0
    print(f"outside: {size(plan.bytes_outside)} of {size(plan.bytes_total)} ({share:.2%})")
    if plan.bytes_written_twice:
        print(f"of it written by CRIU as well: {size(plan.bytes_written_twice)}")
    for task in plan.tasks:
        print(f"\npid {task.pid} {one_line(task.comm)!r}, {len(task.threads)} threads")
        for reason, count in task.by_reason().items():
            _line(reason.where, count, reason.text)
        if task.swapped:
            _line("swapped", task.swapped, _SWAPPED)
        if options.verbose:
            _table(task)
    for number, shared in enumerate(plan.shared, 1):
        users = ", ".join(map(str, shared.pids))
        print(f"\nshared memory {number}, mapped by {users}")
        _line(shared.reason.where, shared.size, shared.reason.text)


def _line(where: str, count: int, text: str) -> None:
    print(f"  {where:<8} {size(count):>10}  {text}")


def _table(task: TaskPlan) -> None:
    rows = [
        (hex(one.start), hex(one.end), size(one.size), one.reason.where, one.reason.name.lower())
        for one in task.areas
    ]
    table(("START", "END", "SIZE", "WHERE", "REASON"), rows)


def _fields(plan: DumpPlan) -> dict[str, Any]:
    return {
        "bytes_total": plan.bytes_total,
        "bytes_outside": plan.bytes_outside,
        "bytes_inside": plan.bytes_inside,
        "bytes_written_twice": plan.bytes_written_twice,
        "tasks": [
            {
                "pid": task.pid,
                "comm": task.comm,
                "threads": list(task.threads),
                "bytes_swapped": task.swapped,
                "areas": [
                    {
                        "start": area.start,
                        "end": area.end,
                        "bytes": area.size,
                        **_verdict(area.reason),
                    }
                    for area in task.areas
                ],
            }
            for task in plan.tasks
        ],
        "shared": [
            {"bytes": one.size, "pids": list(one.pids), **_verdict(one.reason)}
            for one in plan.shared
        ],
    }


def _verdict(reason: Reason) -> dict[str, Any]:
    return {"where": reason.where, "reason": reason.name.lower(), "text": reason.text}
