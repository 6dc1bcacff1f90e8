"""``ovr restore``: restore a checkpoint into a VM, with the options of ``criu restore``."""

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

from ovr.api import attach
from ovr.checkpoint import RUNTIMES, open_checkpoint
from ovr.cli.criu_config import unread_options
from ovr.cli.criu_files import criu_files, stats_text
from ovr.cli.criu_options import Verbosity, add_criu_options
from ovr.cli.logs import DEFAULT_LEVEL
from ovr.cli.output import document, json_option, printed, size
from ovr.cli.picture import Writer, page, picture_file
from ovr.cli.plan import add_outside, show
from ovr.cli.progress import PROGRESS_MODES, make_watch
from ovr.cli.signals import ended_in_order
from ovr.cli.vm_options import add_agent_option, add_vm_options
from ovr.errors import CriuFailed, UsageError
from ovr.plan import NO_POOL, build_inside, make_plan
from ovr.restore import VERIFY_MODES
from ovr.restore.report import Report
from ovr.standby.client import notes

__all__ = ["HELP", "USAGE", "add"]

_DAY = 86_400

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
    parser.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS",
        help="limit for the guest to build the tree (default: none while it makes progress)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check and show the plan only")
    _add_files(parser)
    parser.add_argument(
        "--progress", choices=PROGRESS_MODES, default="auto",
        help="on stderr: a bar, JSON lines, or none; auto is a bar on a terminal",
    )  # fmt: skip
    json_option(parser)
    add_criu_options(parser)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.001 <= value <= _DAY:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to {_DAY}, a day")
    return value


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


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-W", "--work-dir", type=Path, metavar="DIR",
        help="directory for log, pidfile and stats-restore (default: the images' directory)",
    )  # fmt: skip
    parser.add_argument("-o", "--log-file", metavar="FILE", help="log there, not to stderr")
    parser.add_argument(
        "-v", "--verbosity", action=Verbosity, dest="log_level", nargs="?", metavar="NUM",
        default=DEFAULT_LEVEL, help="log more (-vv: all), or criu's level: 0 nothing … 4 all",
    )  # fmt: skip
    parser.set_defaults(verbose=0)
    parser.add_argument(
        "--report", type=Path, metavar="FILE.html", help="draw phases, holds and bytes in this file"
    )
    parser.add_argument("--pidfile", metavar="FILE", help="write the root task's pid there")
    parser.add_argument(
        "--display-stats", action=argparse.BooleanOptionalAction, default=False,
        help="show the content of stats-restore",
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
            print(stats_text(report), file=sys.stderr if options.json else sys.stdout)
    return 0


def _restore(options: argparse.Namespace) -> Report:
    work = options.work_dir or _source(options).get("images") or Path()
    if options.work_dir and not work.is_dir():
        raise UsageError(f"{work} is not a directory", "create it, or name another with -W")
    files = criu_files(
        work, log_file=options.log_file, level=options.log_level, pidfile=options.pidfile
    )
    with (
        files as finish,
        picture_file(options.report) if options.report else nullcontext() as picture,
        make_watch(_progress(options)) as watch,
        attach(options.vm, vmlinux=options.vmlinux, watch=watch) as vm,
    ):
        with _config_in_hints(options):
            report = vm.restore(
                **_source(options), agent=options.agent, outside=options.outside,
                verify=options.verify, criu_options=options.criu_options,
                log_level=options.log_level, timeout=options.timeout,
            )  # fmt: skip
        if missed := _missed(report.unread_config, options):
            log.warning("%s", missed)
        finish(report)
        if picture:
            _draw(picture, report, options)
    return report


@contextmanager
def _config_in_hints(options: argparse.Namespace) -> Iterator[None]:
    # CRIU may have failed because an option in the guest's configuration files was not read.
    try:
        yield
    except CriuFailed as error:
        if missed := _missed(error.unread_config, options):
            error.hint = f"{error.hint}; {missed}" if error.hint else missed
        raise


def _missed(files: Mapping[str, str], options: argparse.Namespace) -> str:
    unread = unread_options(files, options.criu_options)
    if options.no_default_config or not unread.cure:
        return ""
    return f"{unread.fact}: {unread.cure}"


def _draw(picture: Writer, report: Report, options: argparse.Namespace) -> None:
    try:
        picture.write(
            page(
                report,
                {"images": str(options.archive or options.images_dir or "."), "VM": options.vm},
            )
        )
    except OSError as error:  # not a failure of the restore: the tree runs
        log.warning("no report in %s: %s", options.report, error.strerror)


def _source(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `ovr.Vm.restore` that name the checkpoint."""
    names = ("archive", "previous", "name", "runtime", "bundle", "engine_options")
    found = {name: getattr(options, name) for name in names if getattr(options, name)}
    if options.archive is None or options.images_dir is not None:
        found["images"] = options.images_dir or Path()
    return found


def _progress(options: argparse.Namespace) -> str:
    # No bar among log lines.
    logging_here = options.verbose and options.log_file is None
    return "none" if options.progress == "auto" and logging_here else str(options.progress)


def _dry_run(options: argparse.Namespace) -> int:
    with (
        attach(options.vm, vmlinux=options.vmlinux),
        open_checkpoint(**_source(options)) as checkpoint,
    ):
        plan = make_plan(checkpoint.images, options.outside)
        build_inside(plan, NO_POOL)  # fails where a restore would
        show(plan, options)
    return 0


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
