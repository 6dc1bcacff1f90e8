"""``ovr restore``: restore a checkpoint into a VM, with the options of ``criu restore``."""

import argparse
import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

from ovr.api import attach
from ovr.checkpoint import RUNTIMES, open_checkpoint
from ovr.cli.as_criu import (
    add_files,
    add_progress,
    add_timeout,
    config_in_hints,
    missed_options,
    progress_mode,
    work_directory,
)
from ovr.cli.criu_files import RESTORING, criu_files, restore_stats_text
from ovr.cli.criu_options import add_criu_options
from ovr.cli.output import document, json_option, printed, size
from ovr.cli.picture import draw, picture_file
from ovr.cli.plan import add_outside, show
from ovr.cli.progress import make_watch
from ovr.cli.signals import ended_in_order
from ovr.cli.vm_options import add_agent_option, add_vm_options
from ovr.errors import UsageError
from ovr.images.stats import RestoreStatsEntry, restore_stats
from ovr.memory.addresses import PAGE_SIZE
from ovr.plan import NO_POOL, build_inside, make_plan
from ovr.restore import VERIFY_MODES
from ovr.restore.report import Report
from ovr.standby.client import notes

__all__ = ["HELP", "USAGE", "add"]

log = logging.getLogger("ovr.restore")


HELP: Final = """\
restore images into a running VM, from outside, and let them run

Restore a checkpoint of `criu dump` into a running VM, from outside the VM, and let it run. Accepts
the options of `criu restore`.

ovr restore -D images/ --vm libvirt:web
ovr restore -D images/ --vm qmp:/run/vm/qmp.sock --agent vsock:3 --dry-run
ovr restore -D images/ --vm name:web --outside memory,umask --verify full
ovr restore --archive web.tar.zst --vm libvirt:web --name web2 -- --ignore-static-ip
OVR_VM=libvirt:web ovr restore -D images/ -W work/ -d --pidfile pid -o restore.log -v4
"""
USAGE: Final = (
    "ovr restore -D DIR --vm VM [option …] [option of criu restore …]\n"
    "       ovr restore --archive FILE --vm VM [--name NAME] [option …]"
    " [-- podman option …]"
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "-D", "--images-dir", type=Path, metavar="DIR",
        help="the directory that criu dump wrote (default: the current one)",
    )  # fmt: skip
    _add_container(parser)
    add_vm_options(parser)
    add_agent_option(parser)
    add_outside(parser)
    parser.add_argument(
        "--verify", choices=VERIFY_MODES, default="sample",
        help="read back none, a sample or all of the memory before the tree may run",
    )  # fmt: skip
    add_timeout(parser, "build the tree")
    parser.add_argument("--dry-run", action="store_true", help="check and show the plan only")
    add_files(parser, "log, pidfile and stats-restore", "stats-restore")
    parser.add_argument("--pidfile", metavar="FILE", help="write the root task's pid there")
    add_progress(parser)
    json_option(parser)
    add_criu_options(parser, "restore")


def _add_container(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--archive", type=Path, metavar="FILE",
        help="an archive of podman container checkpoint --export: the guest's podman restores it",
    )  # fmt: skip
    parser.add_argument(
        "--import-previous", type=Path, dest="previous", metavar="FILE",
        help="the pre-checkpoint on which the archive builds (podman's --with-previous)",
    )  # fmt: skip
    parser.add_argument(
        "-n",
        "--name",
        metavar="NAME",
        help="the container's new name (default: the old one)",
    )
    parser.add_argument(
        "--runtime", choices=RUNTIMES,
        help="restore a container of this runtime, without podman, into --bundle as --name",
    )  # fmt: skip
    parser.add_argument(
        "--bundle", metavar="DIR", help="the guest's directory with config.json and root"
    )
    parser.add_argument(
        "engine_options", nargs="*", metavar="-- OPTION",
        help="after --: options of podman container restore, or of runc restore; values as"
        " --option=value",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Restore; with ``--dry-run`` do only the steps that do not touch the guest."""
    # Not in the parser, which would report the value of an unknown option instead of the option.
    for word in options.engine_options:
        if not word.startswith("-"):
            raise UsageError(f"{word!r} is not an option", "write values as --option=value")
    for note in notes:
        log.info("%s", note)
    if options.dry_run:
        return _dry_run(options)
    with ended_in_order():
        report = _restore(options)
    with printed(f"pid {report.pid} is restored and runs"):
        if options.json:
            document("ovr.restore/1", report.as_json())
        else:
            print(_sentence(report))
        if options.display_stats:
            text = restore_stats_text(_stats_of(report))
            print(text, file=sys.stderr if options.json else sys.stdout)
    return 0


def _restore(options: argparse.Namespace) -> Report:
    work = work_directory(options, _source(options).get("images"))
    files = criu_files(
        work, RESTORING, log_file=options.log_file, level=options.log_level,
        pidfile=options.pidfile,
    )  # fmt: skip
    with (
        files as finish,
        picture_file(options.report) if options.report else nullcontext() as picture,
        make_watch(progress_mode(options)) as watch,
        attach(options.vm, vmlinux=options.vmlinux, watch=watch) as vm,
    ):
        with config_in_hints(options, "restore"):
            report = vm.restore(
                **_source(options), agent=options.agent, outside=options.outside,
                verify=options.verify, criu_options=options.criu_options,
                log_level=options.log_level, timeout=options.timeout,
            )  # fmt: skip
        if missed := missed_options(report.unread_config, options, "restore"):
            log.warning("%s", missed)
        finish(_stats_of(report), report.pid)
        if picture:
            draw(
                picture, report, options.report,
                images=options.archive or options.images_dir, vm=options.vm,
            )  # fmt: skip
    return report


def _source(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `ovr.Vm.restore` that name the checkpoint."""
    names = ("archive", "previous", "name", "runtime", "bundle", "engine_options")
    found = {name: getattr(options, name) for name in names if getattr(options, name)}
    if options.archive is None or options.images_dir is not None:
        found["images"] = options.images_dir or Path()
    return found


def _dry_run(options: argparse.Namespace) -> int:
    with (
        attach(options.vm, vmlinux=options.vmlinux),
        open_checkpoint(**_source(options)) as checkpoint,
    ):
        plan = make_plan(checkpoint.images, options.outside)
        build_inside(plan, NO_POOL)  # fails where a restore would
        show(plan, options)
    return 0


def _stats_of(report: Report) -> RestoreStatsEntry:
    return restore_stats(
        pages=report.bytes_total // PAGE_SIZE,
        forking=report.seconds["skeleton"],
        total=report.seconds["total"],
    )


def _sentence(report: Report) -> str:
    what = f"pid {report.pid}"
    if report.container is not None:
        what = f"container {report.container[:12]}, {what}"
    return (
        f"restored {what} ({report.tasks} tasks, {size(report.bytes_outside)} of "
        f"{size(report.bytes_total)} from outside, {report.skeleton} skeleton) in "
        f"{report.seconds['total']:.3f} s; "
        f"VM held {report.held['seconds'] * 1e3:.0f} ms, at most "
        f"{report.held['longest'] * 1e3:.0f} ms at once"
    )
