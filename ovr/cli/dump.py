"""``ovr dump``: save a running tree of a VM, with the options of ``criu dump``."""

import argparse
import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

from ovr.api import attach
from ovr.attempt.attempt import agent_address
from ovr.attempt.authentication import authenticate_alone, check_same_guest
from ovr.checkpoint import RUNTIMES
from ovr.cli.as_criu import (
    add_files,
    add_progress,
    add_timeout,
    add_tree,
    config_in_hints,
    missed_options,
    pid_of,
    progress_mode,
    rounds_of,
    work_directory,
)
from ovr.cli.criu_files import DUMPING, criu_files, dump_stats_text
from ovr.cli.criu_options import add_criu_options
from ovr.cli.dump_plan import show
from ovr.cli.output import document, json_option, printed, size
from ovr.cli.picture import draw, picture_file
from ovr.cli.progress import make_watch
from ovr.cli.signals import ended_in_order
from ovr.cli.vm_options import add_agent_option, add_vm_options
from ovr.dump import AS_MANY_AS_HELP, VERIFY_MODES
from ovr.dump.container import STDOUT, Container, to_dump
from ovr.dump.plan import plan_dump
from ovr.dump.report import DumpReport
from ovr.errors import UsageError
from ovr.guest.client.agent import Agent
from ovr.vm.attach import AttachedVm

__all__ = ["HELP", "USAGE", "add"]

log = logging.getLogger("ovr.dump")


HELP: Final = """\
save a running process tree or container of a VM, from outside

Save a process tree that runs in a VM as images of CRIU, its memory from outside the VM, and end it
or let it run on; or a container, as its engine would. CRIU alone restores the images, podman the
archive, and so does `ovr restore`. Accepts the options of `criu dump`.

ovr dump -t 4242 -D images/ --vm libvirt:web
ovr dump -t 4242 -D images/ --vm libvirt:web --dry-run
ovr dump -t 4242 -D images/ --vm name:web -R --pre-copy --verify full
ovr dump --container web --export web.tar.zst --vm libvirt:web
ovr dump --container web --runtime runc -D images/ --vm libvirt:web -- --shell-job
OVR_VM=libvirt:web ovr dump -t 4242 -D images/ -W work/ -o dump.log -v4 --tcp-established
"""
USAGE: Final = (
    "ovr dump -t PID -D DIR --vm VM [option …] [option of criu dump …]\n"
    "       ovr dump --container NAME --export FILE --vm VM [option …] [-- podman option …]\n"
    "       ovr dump --container NAME --runtime runc|crun -D DIR --vm VM [option …]"
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_tree(parser)
    parser.add_argument(
        "-D", "--images-dir", type=Path, metavar="DIR",
        help="the directory for the images, without any yet (default: the current one)",
    )  # fmt: skip
    _add_container(parser)
    add_vm_options(parser)
    add_agent_option(parser)
    parser.add_argument(
        "-R", "--leave-running", action=argparse.BooleanOptionalAction, default=False,
        help="let the tree run on",
    )  # fmt: skip
    parser.add_argument(
        "--pre-copy", nargs="?", type=rounds_of, const=AS_MANY_AS_HELP, default=0, metavar="auto|N",
        help="copy pages while the tree runs, in as many rounds as help or in N, so that it is"
        " stopped for less time; images in a directory then build on those in subdirectories",
    )  # fmt: skip
    parser.add_argument(
        "--verify", choices=VERIFY_MODES, default="sample",
        help="compare none, a sample or all of the memory with the images before the tree may run",
    )  # fmt: skip
    add_timeout(parser, "save all but the memory")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="only show what would be read from outside, and what is left to CRIU",
    )  # fmt: skip
    add_files(parser, "log and stats-dump", "stats-dump")
    add_progress(parser)
    json_option(parser)
    add_criu_options(parser, "dump")


def _add_container(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--container", metavar="NAME", help="a container, by its name or id, instead of -t"
    )
    parser.add_argument(
        "--export", type=Path, metavar="FILE",
        help="a new archive for a container of podman, as of podman container checkpoint --export:"
        " .tar, .tar.zst or .tar.gz; -: a .tar.zst to standard output",
    )  # fmt: skip
    parser.add_argument(
        "--runtime", choices=RUNTIMES,
        help="the container is one of this runtime, without podman, and goes to -D",
    )  # fmt: skip
    parser.add_argument(
        "engine_options", nargs="*", metavar="-- OPTION",
        help="after --: options of podman container checkpoint, or of runc checkpoint; values as"
        " --option=value",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Dump; with ``--dry-run`` only read the VM."""
    wanted = _wanted(options)
    tree, _ = to_dump(**wanted, criu_options=options.criu_options)
    if options.dry_run:
        with AttachedVm(options.vm, vmlinux=options.vmlinux) as vm:
            show(plan_dump(vm.kernel, _root(vm, tree, options.agent)), options)
        return 0
    with ended_in_order():
        report = _dump(wanted, options)
    with printed(f"pid {report.pid} is dumped, and {_fate(report)}"):
        taken = options.json or options.export == STDOUT
        if options.json:
            document("ovr.dump/1", report.as_json())
        else:
            print(_sentence(report), file=sys.stderr if taken else sys.stdout)
        if options.display_stats:
            print(dump_stats_text(report.stats), file=sys.stderr if taken else sys.stdout)
    return 0


def _wanted(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `ovr.Vm.dump` that name the tree and its place."""
    images = options.images_dir
    if options.export == STDOUT and options.json and not options.dry_run:
        raise UsageError("standard output cannot get an archive and JSON", "leave out --json")
    if images is None and options.export is None:
        images = Path()
    return {
        "pid": None if options.tree is None else pid_of(options.tree),
        "images": images,
        "container": options.container,
        "export": options.export,
        "runtime": options.runtime,
        "engine_options": options.engine_options,
    }


def _root(vm: AttachedVm, tree: int | Container, address: str | None) -> int:
    if isinstance(tree, int):
        return tree
    with Agent.connect(agent_address(vm, address)) as agent:
        check_same_guest(vm.kernel, agent)
        authenticate_alone(vm.kernel, agent, vm.qmp, vm.ram.slots)
        return tree.find(agent).pid


def _dump(wanted: dict[str, Any], options: argparse.Namespace) -> DumpReport:
    files = criu_files(
        work_directory(options, wanted["images"]), DUMPING,
        log_file=options.log_file, level=options.log_level,
    )  # fmt: skip
    with (
        files as finish,
        picture_file(options.report) if options.report else nullcontext() as picture,
        make_watch(progress_mode(options)) as watch,
        attach(options.vm, vmlinux=options.vmlinux, watch=watch) as vm,
    ):
        with config_in_hints(options, "dump"):
            report = vm.dump(
                **wanted, agent=options.agent,
                leave_running=options.leave_running, pre_copies=options.pre_copy,
                verify=options.verify,
                criu_options=options.criu_options, log_level=options.log_level,
                timeout=options.timeout,
            )  # fmt: skip
        if missed := missed_options(report.unread_config, options, "dump"):
            log.warning("%s", missed)
        if options.export is None or options.work_dir:
            finish(report.stats, report.pid)  # podman's archive has the statistics
        if picture:
            place = options.export or wanted["images"]
            draw(picture, report, options.report, images=place, vm=options.vm)
    return report


def _fate(report: DumpReport) -> str:
    return "runs on" if report.left_running else "has ended"


def _sentence(report: DumpReport) -> str:
    what = f"pid {report.pid}"
    if report.container is not None:
        what = f"container {report.container[:12]}, {what}"
    return (
        f"dumped {what}, which {_fate(report)} ({report.tasks} tasks, "
        f"{size(report.bytes_outside)} of {size(report.bytes_total)} from outside) in "
        f"{report.seconds['total']:.3f} s; frozen {report.frozen:.3f} s; "
        f"VM held {report.held['seconds'] * 1e3:.0f} ms, at most "
        f"{report.held['longest'] * 1e3:.0f} ms at once"
    )
