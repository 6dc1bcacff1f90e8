"""``ovr warm``: memory that is ready in the guest before a restore wants it."""

import argparse
from dataclasses import asdict
from typing import Any

from ovr.cli.output import common, document, size
from ovr.cli.vm_options import add_agent_option, add_vm_options
from ovr.errors import AgentUnreachable, LabError, UsageError
from ovr.lab.ram import memory_size
from ovr.vm.agent import Agent
from ovr.vm.attach import AttachedVm
from ovr.vm.find import find_vm
from ovr.vm.proof import prove

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "warm",
        help="have memory ready in a guest before a restore wants it",
        description="Have the guest's agent start a CRIU in advance, with a pool of memory that is"
        " allocated already. The next restore that fits into it takes it and is done sooner."
        " Without an option, say what there is.",
        examples="""\
            ovr warm --vm libvirt:web --size 5G
            ovr warm --vm libvirt:web
            ovr warm --vm qmp:/run/vm/qmp.sock --agent vsock:3 --off
            """,
    )
    add_vm_options(parser)
    add_agent_option(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--size", metavar="SIZE", help="make a pool of so much memory, as 5G, in place of the last"
    )
    what.add_argument("--off", action="store_true", help="give the pool back to the guest")
    common(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make or end the pool, or ask for it; then say what there is."""
    wanted = 0 if options.off else _bytes(options.size) if options.size else None
    address = options.agent or find_vm(options.vm).agent
    if address is None:
        raise AgentUnreachable(
            f"nobody said where the agent of {options.vm} is", "give --agent ADDR"
        )
    with Agent.connect(address) as agent:
        if wanted is None:
            pool = agent.pool()
        else:
            with AttachedVm(options.vm, vmlinux=options.vmlinux) as vm:
                prove(vm.kernel, agent)
            pool = agent.warm(wanted)
    if options.json:
        fields = asdict(pool)
        del fields["address"]
        document("ovr.warm/1", fields)
    elif pool.size:
        print(f"{size(pool.size)} are ready, {size(pool.huge)} of them in huge pages")
    else:
        print(f"no pool: {pool.note}")
    return 0


def _bytes(text: str) -> int:
    try:
        return memory_size(text)
    except LabError as error:
        raise UsageError(str(error), error.hint or "write 5G or 1536M") from error
