"""``ovr lab up|sh|put|get|down|ls``: manage lab VMs."""

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from ovr import lab
from ovr.cli.output import common, document, size, table
from ovr.errors import UsageError
from ovr.lab.image import SUITES
from ovr.lab.qemu import BACKENDS

__all__ = ["HELP", "add"]


HELP: Final = """\
make and use VMs for experiments

Make Debian VMs with CRIU and the agent in them, to try ovr on.

ovr lab up one --suite bookworm --memory 2G
ovr lab up two --kernel linux-image-rt-amd64/trixie-backports
ovr lab sh one 'criu --version'
ovr lab put one ./program /root/program
ovr lab down one
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    _add_up(verbs)
    sh = _verb(verbs, "sh", _sh, "run a shell command in the guest, or a shell on stdin", name=True)
    sh.add_argument("command", nargs="*", metavar="WORD", help="default: read commands from stdin")
    sh.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    put = _verb(verbs, "put", _put, "copy a file into the guest", name=True)
    put.add_argument("local", type=Path)
    put.add_argument("remote")
    get = _verb(verbs, "get", _get, "copy a file out of the guest", name=True)
    get.add_argument("remote")
    get.add_argument("local", type=Path)
    _verb(verbs, "down", _down, "end a VM and remove its files", name=True)
    _verb(verbs, "ls", _ls, "list the lab's VMs")


def _verb(verbs: Any, verb: str, run: Any, text: str, *, name: bool = False) -> Any:
    parser = verbs.add_parser(verb, help=text, description=text)
    if name:
        parser.add_argument("name", metavar="NAME")
    common(parser)
    parser.set_defaults(run=run)
    return parser


def _add_up(verbs: Any) -> None:
    up = _verb(verbs, "up", _up, "boot a VM and wait for its agent", name=True)
    up.add_argument("--suite", choices=sorted(SUITES), default="trixie")
    up.add_argument("--memory", default="4G", metavar="SIZE")
    up.add_argument("--cpus", type=int, default=2, metavar="N")
    up.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto")
    up.add_argument(
        "--la57", action=argparse.BooleanOptionalAction, default=None,
        help="with or without 5-level paging; default: that of the CPU model",
    )  # fmt: skip
    up.add_argument(
        "--numa", type=int, default=1, metavar="N", help="NUMA nodes, one RAM file each"
    )
    up.add_argument(
        "--kernel", default="", metavar="PACKAGE[/RELEASE]",
        help="the kernel of this Debian package; default: the suite's linux-image-cloud-amd64",
    )  # fmt: skip
    up.add_argument(
        "--append", default="", metavar="WORDS", help="for the kernel's command line: nokaslr"
    )
    up.add_argument(
        "--backend", choices=BACKENDS, default="file",
        help="backing of the RAM: files in a tmpfs (file), memfds, or files in a hugetlbfs",
    )  # fmt: skip
    up.add_argument(
        "--share", type=Path, metavar="DIR", help="a host directory for the guest, at /mnt/share"
    )


def _up(options: argparse.Namespace) -> int:
    vm = lab.up(
        options.name, suite=options.suite, memory=options.memory, cpus=options.cpus,
        accel=options.accel, la57=options.la57, numa=options.numa, share=options.share,
        kernel=options.kernel, append=options.append, backend=options.backend,
    )  # fmt: skip
    if options.json:
        document("ovr.lab/1", _fields(vm))
    else:
        print(f"lab:{vm.name} is up: qmp:{vm.qmp}, agent {vm.agent}")
    return 0


def _sh(options: argparse.Namespace) -> int:
    command, stdin = " ".join(options.command), b""
    if not command:
        command, stdin = "exec /bin/sh -s", sys.stdin.buffer.read()
    done = lab.get(options.name).sh(command, input=stdin, timeout=options.timeout)
    if options.json:
        output = {
            "status": done.status,
            "stdout": done.stdout.decode(errors="replace"),
            "stderr": done.stderr.decode(errors="replace"),
        }
        document("ovr.lab.sh/1", output)
    else:
        sys.stdout.buffer.write(done.stdout)
        sys.stdout.buffer.flush()
        sys.stderr.buffer.write(done.stderr)
    return done.status


def _put(options: argparse.Namespace) -> int:
    if not options.local.is_file():
        raise UsageError(f"{options.local} is not a file")
    mode = options.local.stat().st_mode & 0o777
    lab.get(options.name).put(options.local, options.remote, mode)
    return 0


def _get(options: argparse.Namespace) -> int:
    lab.get(options.name).get(options.remote, options.local)
    return 0


def _down(options: argparse.Namespace) -> int:
    lab.get(options.name).down()
    return 0


def _ls(options: argparse.Namespace) -> int:
    vms = lab.ls()
    if options.json:
        document("ovr.lab.ls/1", {"vms": [_fields(vm) for vm in vms]})
        return 0
    table(
        ("NAME", "SUITE", "MEMORY", "CPUS", "ACCEL", "STATE", "AGENT"),
        [
            (
                vm.name, vm.suite, size(vm.hardware.memory), vm.hardware.cpus, vm.hardware.engine,
                f"pid {vm.pid}" if vm.alive else "dead", vm.agent,
            )
            for vm in vms
        ],
    )  # fmt: skip
    return 0


def _fields(vm: lab.LabVm) -> dict[str, Any]:
    return {
        "name": vm.name,
        "suite": vm.suite,
        "memory": vm.hardware.memory,
        "cpus": vm.hardware.cpus,
        "accel": vm.hardware.engine,
        "alive": vm.alive,
        "qmp": str(vm.qmp),
        "agent": vm.agent,
        "serial": vm.serial,
        "console": str(vm.console),
    }
