"""``ovr check``: check whether a VM can be restored into, and print a fix for each problem."""

import argparse
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ovr.attempt.authentication import authenticate_alone
from ovr.checkpoint import runs_scripts_for_engines
from ovr.cli.criu_config import unread_options
from ovr.cli.output import document, one_line, size
from ovr.cli.terminal import painted
from ovr.cli.vm_options import add_agent_option, add_vm_options
from ovr.errors import AgentUntrusted, OvrError, UsageError
from ovr.guest.client.agent import Agent
from ovr.guest.client.session import AgentInfo
from ovr.kernel import Kernel
from ovr.memory.ram import GuestRam
from ovr.vm.blockers import balloon_size, blockers
from ovr.vm.find import find_vm
from ovr.vm.hold import Holder
from ovr.vm.lock import locked
from ovr.vm.memory_map import guest_slots
from ovr.vm.qmp import Monitor

__all__ = ["HELP", "add"]

_NO_ADDRESS: Final = (
    "give --agent ADDR; the VM needs -device vhost-vsock-pci,guest-cid=N (libvirt: <vsock>), or a"
    " virtio-serial port org.ovr.0"
)
_INSTALL: Final = (
    "to install it: `ovr agent deb` here, `apt install ./ovr-agent_*.deb` in the guest"
)


@dataclass(frozen=True)
class Item:
    """One condition of a restore, the value found, and the fix if the condition fails."""

    what: str
    ok: bool
    found: str
    fix: str = ""


HELP: Final = """\
check whether a VM can be restored into

Check VM, guest kernel and agent, and print a fix for each problem. Changes nothing. Exits with 4 if
a check fails.

ovr check --vm libvirt:web
ovr check --vm qmp:/run/vm/qmp.sock --agent vsock:3 --json
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_vm_options(parser)
    add_agent_option(parser)


def run(options: argparse.Namespace) -> int:
    """Run the checks, as far as the results of previous ones permit."""
    address = find_vm(options.vm)
    with ExitStack() as stack:
        qmp = stack.enter_context(address.connect())
        look = _Look(qmp)
        items = [*_vm(look, stack, options.vmlinux), *_agent(look, options.agent or address.agent)]
    ok = all(item.ok for item in items)
    if options.json:
        document("ovr.check/1", {"ok": ok, "items": [asdict(item) for item in items]})
    else:
        for item in items:
            cure = f"  → {one_line(item.fix)}" if item.fix else ""
            print(f"{_mark(item.ok)}  {item.what:<16} {one_line(item.found)}{cure}")
        print("Looks good." if ok else "Does not look good.")
    return 0 if ok else 4


def _mark(ok: bool) -> str:
    return painted("ok  ", "good", sys.stdout) if ok else painted("FAIL", "bad", sys.stdout)


@dataclass
class _Look:
    # Results so far. `idle`: no other ovr restores into the VM, so it may be held.
    qmp: Monitor
    ram: GuestRam | None = None
    kernel: Kernel | None = None
    idle: bool = False


def _vm(look: _Look, stack: ExitStack, vmlinux: Path | None) -> Iterator[Item]:
    qmp = look.qmp
    version = qmp.execute("query-version")["qemu"]
    yield Item("QMP", True, f"QEMU {version['major']}.{version['minor']}.{version['micro']}")
    yield Item("host", platform.machine() == "x86_64", platform.machine())
    balloon = balloon_size(qmp)
    what = "guest RAM"
    try:
        ram = look.ram = stack.enter_context(GuestRam(guest_slots(qmp), writable=True))
        files = {slot.file for slot in ram.slots}
        yield Item(what, True, f"{size(ram.size)} in {len(files)} shared files")
        what = "guest kernel"
        look.kernel = Kernel.find(ram, vmlinux)
        yield from _kernel(look.kernel)
        what = "other restores"
        with locked(ram.slots):
            look.idle = True
            yield Item(what, True, "none under way")
            what = "holding it still"
            if qmp.status() == "running":  # otherwise `_state` reports it
                with Holder(qmp) as holder:
                    yield Item(what, True, f"by {holder.way}")
    except OvrError as error:
        yield Item(what, False, str(error), error.hint)
    yield from _state(qmp, balloon)


def _state(qmp: Monitor, balloon: int | None) -> Iterator[Item]:
    reasons = blockers(qmp, balloon)
    for reason in reasons:
        yield Item("VM state", False, str(reason), reason.hint)
    if not reasons:
        status = qmp.status()
        cure = "" if status == "running" else "resume it (QMP cont, virsh resume)"
        yield Item("VM state", not cure, status, cure)


def _kernel(kernel: Kernel) -> Iterator[Item]:
    yield Item("guest kernel", True, f"{kernel.release}, {kernel.space.levels}-level paging")
    frames = kernel.private_frames
    mask = f"PG_anon_exclusive is {frames.page_mask:#x}"
    yield Item("struct page", True, f"{frames.stride} bytes, {mask}")


def _containers(hello: AgentInfo) -> str:
    names = ", ".join(hello.engines)
    return names if runs_scripts_for_engines(hello) else f"{names}, but they need CRIU 3.19"


def _authenticate(look: _Look, agent: Agent) -> bool:
    # Needs the kernel, and a hold, which would end that of another restore.
    if not (look.idle and look.kernel and look.ram):
        return False
    authenticate_alone(look.kernel, agent, look.qmp, look.ram.slots)
    return True


def _agent(look: _Look, address: str | None) -> Iterator[Item]:
    if address is None:
        yield Item("agent", False, "no address is known", _NO_ADDRESS)
        return
    try:
        with Agent.connect(address) as agent:
            authentic = _authenticate(look, agent)
            hello = agent.hello
            config = agent.criu_config() if authentic else {}
    except UsageError:
        raise
    except AgentUntrusted as error:
        yield Item("agent", False, str(error), error.hint)
        return
    except OvrError as error:
        yield Item("agent", False, str(error), f"{error.hint}; {_INSTALL}")
        return
    yield _found(hello, address, authentic=authentic)
    if config:
        unread = unread_options(config)
        yield Item("CRIU's options", True, unread.fact, unread.cure)


def _found(hello: AgentInfo, address: str, *, authentic: bool) -> Item:
    if hello.criu is None:
        return Item("agent", False, "the guest has no CRIU", "apt-get install criu, in the guest")
    text = f"version {hello.agent}, CRIU {hello.criu}, at {address}"
    if not authentic:
        text += "; not authenticated"
    if hello.engines:
        text += f"; containers: {_containers(hello)}"
    if not hello.force_write:
        text += (
            "; read-only memory stays inside (boot the guest with proc_mem.force_override=always)"
        )
    return Item("agent", True, text)
