"""``ovr ps``: list the guest's processes, read from outside."""

import argparse
from typing import Any, Final

from ovr.cli.output import document, table
from ovr.cli.vm_options import add_vm_options
from ovr.kernel import Process, processes
from ovr.vm.attach import AttachedVm

__all__ = ["HELP", "add"]


HELP: Final = """\
show the guest's processes, read from outside

Read the process list out of the guest's memory. Nothing runs in the guest, which need not have an
agent.

ovr ps --vm libvirt:web
ovr ps --vm qmp:/run/vm/qmp.sock --json
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_vm_options(parser)


def run(options: argparse.Namespace) -> int:
    """List every process once; kernel threads are in brackets, as in ps(1)."""
    with AttachedVm(options.vm, vmlinux=options.vmlinux) as vm:
        release, found = vm.kernel.release, processes(vm.kernel)
    if options.json:
        document("ovr.ps/1", {"kernel": release, "processes": [_fields(one) for one in found]})
        return 0
    table(
        ("PID", "PPID", "S", "THREADS", "NAME"),
        [
            (one.pid, one.ppid, one.state, one.threads, f"[{one.comm}]" if one.kernel else one.comm)
            for one in found
        ],
    )
    return 0


def _fields(process: Process) -> dict[str, Any]:
    return {
        "pid": process.pid,
        "ppid": process.ppid,
        "threads": list(process.tids),
        "state": process.state,
        "name": process.comm,
        "kernel": process.kernel,
    }
