"""``ovr list``: list the VMs of this host, and whether each can be restored into."""

import argparse
import sys
from typing import Any, Final

from ovr.cli.output import document, one_line, size, table
from ovr.cli.terminal import painted
from ovr.vm.census import FoundVm, found_vms

__all__ = ["HELP"]


HELP: Final = """\
list the VMs of this host, and which can be used

List all QEMU VMs of this host with their names for --vm, and whether each can be restored into; if
not, the reason and a fix. Guests and agents are not contacted.

ovr list
ovr list -v              # all names of each
ovr list --json
"""


def run(options: argparse.Namespace) -> int:
    """List the VMs; those that cannot be restored into with the reason and a fix."""
    found = found_vms()
    if options.json:
        document("ovr.list/1", {"vms": [_fields(vm) for vm in found]})
        return 0
    rows = [
        (
            vm.names[0],
            vm.pid,
            "-" if vm.memory is None else size(vm.memory),
            vm.state or "-",
            vm.agent or "-",
            "no" if vm.problem else "yes",
        )
        for vm in found
    ]
    table(("VM", "PID", "MEMORY", "STATE", "AGENT AT", "USABLE"), rows)
    for vm in found:
        if options.verbose and len(vm.names) > 1:
            print(one_line(f"{vm.names[0]} is also {', '.join(vm.names[1:])}"))
        if vm.problem:
            reason = f"{vm.problem}  → {vm.problem.hint}" if vm.problem.hint else str(vm.problem)
            no = painted("cannot be restored into", "bad", sys.stdout)
            print(f"{one_line(vm.names[0])} {no}: {one_line(reason)}")
    return 0


def _fields(vm: FoundVm) -> dict[str, Any]:
    problem = vm.problem
    return {
        "pid": vm.pid,
        "name": vm.name,
        "names": list(vm.names),
        "agent": vm.agent,
        "state": vm.state,
        "memory": vm.memory,
        "usable": problem is None,
        "problem": problem and {
            "kind": problem.kind, "message": str(problem), "hint": problem.hint
        },
    }  # fmt: skip
