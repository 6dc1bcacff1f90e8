"""``ovr move``: move a running tree from one VM to another."""

import argparse
import logging
import re
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Final

from ovr.api import attach
from ovr.attempt.attempt import Attempt, agent_address
from ovr.attempt.authentication import authenticate_alone, check_same_guest
from ovr.cli.as_criu import (
    add_progress,
    add_timeout,
    add_tree,
    pid_of,
    progress_mode,
    rounds_of,
)
from ovr.cli.criu_files import logged
from ovr.cli.criu_options import add_criu_options, add_verbosity
from ovr.cli.output import document, json_option, printed, size
from ovr.cli.progress import make_watch
from ovr.cli.signals import ended_in_order
from ovr.dump import AS_MANY_AS_HELP, VERIFY_MODES
from ovr.errors import UsageError
from ovr.guest.client.agent import Agent
from ovr.move import DOWNTIME, MoveReport
from ovr.move.decide import decide
from ovr.move.scratch import sweep
from ovr.vm.attach import AttachedVm

__all__ = ["HELP", "USAGE", "add"]

_log = logging.getLogger("ovr.move")

HELP: Final = """\
move a running process tree or container from one VM to another, from outside

Move a process tree from one VM of this host to another. Its memory goes from RAM to RAM while it
runs; then it is stopped, the rest follows, and it runs on in the other VM. It never runs in both,
and after an error it runs on where it was. If ovr cannot tell whether it runs in the other VM (exit
code 9), the old tree stays frozen until --finish or --back decides the move. Accepts the options of
`criu dump` and `criu restore`, for the CRIU of both VMs. A container of podman comes with the
changes in its root file system; its memory goes when it is stopped.

ovr move -t 4242 --from libvirt:a --to libvirt:b
ovr move -t 4242 --from name:a --to name:b --rounds 3 --verify full --json
ovr move --container web --from libvirt:a --to libvirt:b
ovr move --finish --from libvirt:a --to libvirt:b
ovr move --back --from libvirt:a --to libvirt:b
"""
USAGE: Final = (
    "ovr move -t PID --from VM --to VM [option …] [option of criu …]\n"
    "       ovr move --container NAME --from VM --to VM [option …] [-- podman option …]\n"
    "       ovr move --finish|--back --from VM [--to VM] [--id ID]"
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_tree(parser)
    parser.add_argument(
        "--container", metavar="NAME",
        help="a container of podman in the VM --from, by its name or id, instead of -t",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="source", metavar="VM", required=True, help="the VM that has the tree"
    )
    parser.add_argument(
        "--to", dest="destination", metavar="VM", help="the VM that gets it, on this host"
    )
    for side in ("from", "to"):
        parser.add_argument(
            f"--{side}-agent", metavar="ADDR",
            help=f"the agent of the VM --{side} (default: found from the VM's devices)",
        )  # fmt: skip
        parser.add_argument(
            f"--{side}-vmlinux", metavar="FILE", type=Path,
            help=f"the kernel of the VM --{side}, if the guest keeps no symbols or types",
        )  # fmt: skip
    parser.add_argument(
        "--rounds", type=_rounds_of, default=AS_MANY_AS_HELP, metavar="auto|N",
        help="copy memory while the tree runs in N rounds, or in as many as help (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--downtime", type=_duration, default=DOWNTIME, metavar="300ms",
        help="with --rounds auto: stop the tree when what has changed is copied in that time"
        " (default: 300ms); the two CRIUs' part of the downtime comes on top",
    )  # fmt: skip
    parser.add_argument(
        "--strict", action="store_true",
        help="let the tree stay where it is if it writes too fast for that",
    )  # fmt: skip
    parser.add_argument(
        "--verify", choices=VERIFY_MODES, default="sample",
        help="compare none, a sample or all of the memory of both VMs before the tree may run",
    )  # fmt: skip
    parser.add_argument(
        "--ignore-cpu", action="store_true",
        help="move the tree even if the CPU of --to lacks features of that of --from",
    )  # fmt: skip
    _add_decisions(parser)
    add_timeout(parser, "save, or to build, the tree without its memory")
    add_progress(parser)
    add_verbosity(parser)
    parser.add_argument("-o", "--log-file", metavar="FILE", help="log there, not to stderr")
    json_option(parser)
    parser.add_argument(
        "engine_options", nargs="*", metavar="-- OPTION",
        help="after --: options of podman container checkpoint and podman container restore; values"
        " as --option=value",
    )  # fmt: skip
    add_criu_options(parser, "dump and criu restore")


def _add_decisions(parser: argparse.ArgumentParser) -> None:
    decision = parser.add_mutually_exclusive_group()
    decision.add_argument(
        "--finish", action="store_true",
        help="decide a move that is in doubt: end the frozen tree of --from, because that of --to"
        " runs, or has run",
    )  # fmt: skip
    decision.add_argument(
        "--back", action="store_true",
        help="decide a move that is in doubt: let the frozen tree of --from run on, because that"
        " of --to never ran; without --to, because that VM is gone for good",
    )  # fmt: skip
    parser.add_argument(
        "--id", metavar="ID", help="with --finish or --back: the move, if several are in doubt"
    )


def run(options: argparse.Namespace) -> int:
    """Move, or decide a move."""
    _check(options)
    log: AbstractContextManager[None] = nullcontext()
    if options.log_file is not None:
        log = logged(Path(options.log_file), options.log_level, _log, "Moving FAILED.")
    with log:
        return _decide(options) if options.finish or options.back else _move_and_tell(options)


def _rounds_of(text: str) -> int:
    rounds = rounds_of(text)
    if not rounds:
        raise argparse.ArgumentTypeError("a move takes one round at least")
    return rounds


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 300ms or 1.5s")
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


def _check(options: argparse.Namespace) -> None:
    if options.source == options.destination:
        # To attach to it twice would end in an error about its monitor, which has one client.
        error = UsageError("--from and --to are the same VM", "name two VMs")
        error.code = "same-vm"
        raise error
    if options.finish or options.back:
        if options.tree is not None or options.container is not None:
            raise UsageError(
                "-t and --container begin a move, --finish and --back decide one",
                "omit one of them",
            )
        if options.finish and options.destination is None:
            raise UsageError("a move is finished by looking into its destination", "give --to VM")
        return
    if options.id is not None:
        raise UsageError("--id names a move that is in doubt", "give --finish or --back, too")
    if (options.tree is None) == (options.container is None) or options.destination is None:
        raise UsageError(
            "not exactly one tree to move, or no VM to move it to",
            "give -t PID or --container NAME, and --to VM",
        )


def _move_and_tell(options: argparse.Namespace) -> int:
    tree = options.container if options.tree is None else pid_of(options.tree)
    with ended_in_order():
        report = _move(tree, options)
    with printed(f"pid {report.pid} runs in {options.destination}"):
        if options.json:
            document("ovr.move/1", report.as_json())
        else:
            print(_sentence(report, options))
    return 0


def _move(tree: int | str, options: argparse.Namespace) -> MoveReport:
    with (
        make_watch(progress_mode(options)) as watch,
        attach(options.source, vmlinux=options.from_vmlinux, watch=watch) as source,
        attach(options.destination, vmlinux=options.to_vmlinux) as destination,
    ):
        return source.move(
            tree, destination, agent=options.from_agent, to_agent=options.to_agent,
            rounds=options.rounds, downtime=options.downtime, strict=options.strict,
            verify=options.verify, check_cpu=not options.ignore_cpu,
            criu_options=options.criu_options, log_level=options.log_level,
            engine_options=options.engine_options, timeout=options.timeout,
        )  # fmt: skip


def _decide(options: argparse.Namespace) -> int:
    sweep()  # the move may have been killed
    with ExitStack() as stack:
        there = None
        if options.destination is not None:
            there = _authenticated(options, stack)
        vm = stack.enter_context(attach(options.source, vmlinux=options.from_vmlinux))
        source = stack.enter_context(Attempt(vm, options.from_agent))
        name = decide(source, there, options.id, finish=options.finish)
    done = "finished" if options.finish else "taken back"
    with printed(f"the move {name} was {done}"):
        if options.json:
            document("ovr.move.decided/1", {"move": name, "decision": done})
        else:
            where = options.destination if options.finish else options.source
            print(f"move {name} was {done}: {where} has the tree")
    return 0


def _authenticated(options: argparse.Namespace, stack: ExitStack) -> Agent:
    vm = stack.enter_context(AttachedVm(options.destination, vmlinux=options.to_vmlinux))
    agent = stack.enter_context(Agent.connect(agent_address(vm, options.to_agent)))
    check_same_guest(vm.kernel, agent)
    authenticate_alone(vm.kernel, agent, vm.qmp, vm.ram.slots)
    return agent


def _sentence(report: MoveReport, options: argparse.Namespace) -> str:
    what = f"container {report.container[:12]}" if report.container else f"pid {report.pid}"
    return (
        f"moved {what} from {options.source} to {options.destination}"
        f" ({report.tasks} tasks, {size(report.bytes_total)}) in {report.seconds['total']:.3f} s;"
        f" down for {report.downtime:.3f} s"
    )
