"""``ovr agent build|unit|cloud-init|deb``: build and package the agent for guests."""

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from ovr.cli.output import common, document
from ovr.guest.compiler import build, deliver
from ovr.guest.package import cloud_init, debian_package, unit

__all__ = ["HELP", "add"]

_MAINTAINER = "local administrator <root@localhost>"


HELP: Final = """\
make the agent, for your guests

Make the program that a guest must run, in the form that suits the guest.

ovr agent deb            # then, in the guest: apt install ./ovr-agent_*.deb
ovr agent cloud-init > user-data
ovr agent build -o ovr-agent
ovr agent unit > ovr-agent.service
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    verb = _verb(verbs, "build", _build, "compile the agent: one static binary")
    verb.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: ovr-agent, in this directory"
    )
    _verb(verbs, "unit", _unit, "print its systemd unit")
    _verb(verbs, "cloud-init", _cloud_init, "print a cloud-config that installs it, agent included")
    verb = _verb(verbs, "deb", _deb, "make a Debian package of it")
    verb.add_argument(
        "-o", "--output", type=Path, metavar="FILE|DIR",
        help="default: its usual name, in this directory",
    )  # fmt: skip
    verb.add_argument(
        "--maintainer", default=_MAINTAINER, metavar="NAME <ADDRESS>",
        help="the maintainer of the package",
    )  # fmt: skip


def _verb(verbs: Any, verb: str, run: Any, text: str) -> Any:
    parser = verbs.add_parser(verb, help=text, description=f"{text[0].upper()}{text[1:]}.")
    common(parser)
    parser.set_defaults(run=run)
    return parser


def _build(options: argparse.Namespace) -> int:
    path = options.output or Path("ovr-agent")
    deliver(build(), path, 0o755)
    return _made(path, options)


def _deb(options: argparse.Namespace) -> int:
    return _made(debian_package(options.output or Path(), options.maintainer), options)


def _made(path: Path, options: argparse.Namespace) -> int:
    if options.json:
        document("ovr.agent/1", {"path": str(path), "size": path.stat().st_size})
    else:
        print(path)
    return 0


def _unit(options: argparse.Namespace) -> int:
    return _text(unit(), options)


def _cloud_init(options: argparse.Namespace) -> int:
    return _text(cloud_init(), options)


def _text(text: str, options: argparse.Namespace) -> int:
    if options.json:
        document("ovr.agent.text/1", {"text": text})
    else:
        sys.stdout.write(text)
    return 0
