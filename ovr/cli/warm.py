"""``ovr warm``: manage the guest's pool and the standby process, before a restore needs them."""

import argparse
import logging
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Final

from ovr.attempt.authentication import authenticate_alone
from ovr.cli.output import document, size
from ovr.cli.vm_options import add_agent_option, add_vm_options
from ovr.errors import AgentUnreachable, ImagesUnsupported
from ovr.guest.client.agent import Agent
from ovr.guest.client.session import AgentInfo
from ovr.host.size import parse_size
from ovr.images import ImageSet
from ovr.memory.addresses import PAGE_SIZE
from ovr.plan import make_plan, pool_for
from ovr.plan.pool.layout import NOTHING
from ovr.plan.pool.table import foreign_cgroup
from ovr.standby.keep import stand_by, stand_down
from ovr.standby.messages import StandbyError
from ovr.vm.attach import AttachedVm
from ovr.vm.find import find_vm

__all__ = ["HELP", "add"]

log = logging.getLogger("ovr.warm")


HELP: Final = """\
allocate memory in a guest before a restore needs it

Make the guest's agent start a CRIU in advance, with a pool of allocated memory. The next restore
that fits into it uses it and takes less time. Also start a standby process on this host, in which
ovr is already loaded. Without an option, show the pool.

ovr warm --vm libvirt:web -D images/
ovr warm --vm libvirt:web --size 5G
ovr warm --vm libvirt:web --standby
ovr warm --vm libvirt:web
ovr warm --vm qmp:/run/vm/qmp.sock --agent vsock:3 --off
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_vm_options(parser)
    add_agent_option(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--size", metavar="SIZE", help="make a pool of this size, such as 5G; replaces the last one"
    )
    what.add_argument(
        "-D", "--images-dir", metavar="DIR", type=Path,
        help="make a pool for these images; replaces the last one",
    )  # fmt: skip
    what.add_argument(
        "--standby", dest="only_standby", action="store_true",
        help="make no pool; only start the standby process on this host",
    )  # fmt: skip
    what.add_argument(
        "--off", action="store_true",
        help="return the pool to the guest, and end the standby process for this VM",
    )  # fmt: skip
    parser.add_argument(
        "--no-standby", dest="standby", action="store_false",
        help="start no standby process on this host",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Make, end or query the pool; then show it."""
    wanted = None
    if options.off:
        wanted = (0, 0)
    elif options.size:
        wanted = (parse_size(options.size, PAGE_SIZE), 0)
    address = options.agent or find_vm(options.vm).agent
    if address is None:
        raise AgentUnreachable(f"no agent address is known for {options.vm}", "give --agent ADDR")
    with Agent.connect(address) as agent:
        if wanted is None and options.images_dir is None:
            pool = agent.pool()
        else:
            with AttachedVm(options.vm, vmlinux=options.vmlinux) as vm:
                authenticate_alone(vm.kernel, agent, vm.qmp, vm.ram.slots)
                qemu = vm.qmp.qemu_pid
            if wanted is None:
                wanted = _fitting(options.images_dir, agent.hello)
            pool = agent.warm(*wanted)
            _stand_by(qemu, bool(pool.size) and options.standby)
    if options.only_standby:
        with closing(find_vm(options.vm).connect()) as qmp:
            _stand_by(qmp.qemu_pid, True)
    if options.json:
        fields = asdict(pool)
        del fields["address"]
        document("ovr.warm/1", fields)
    elif pool.size:
        print(f"{size(pool.size)} are ready, {size(pool.huge)} of them in huge pages")
    else:
        print(f"no pool: {pool.note}")
    return 0


def _stand_by(qemu_pid: int, wanted: bool) -> None:
    if not wanted:
        stand_down(qemu_pid)
        return
    try:
        stand_by(qemu_pid)
    except StandbyError as error:
        log.warning("no standby process on this host, so a restore has to load ovr: %s", error)


def _fitting(directory: Path, guest: AgentInfo) -> tuple[int, int]:
    # The arguments of `Agent.warm`.
    with ImageSet.open(directory) as images:
        fitting = pool_for(make_plan(images, force_write=guest.force_write))
        if foreign_cgroup(images, ()):
            log.warning(
                "%s: its tasks belong into cgroups; a restore takes a pool only with"
                " --manage-cgroups=ignore",
                directory,
            )
    if fitting is None:
        raise ImagesUnsupported(f"{directory}: {NOTHING}", "restore without a pool")
    return fitting
