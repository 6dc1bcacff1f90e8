"""The command line: ``python -m ovr COMMAND …``, one module a command.

Results go to stdout, everything else to stderr. An `OvrError` becomes one line and its exit code;
with ``--json`` it is also an object on stdout.
"""

import argparse
import errno
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, Final

from ovr.cli import completion, output, process
from ovr.cli.logs import DEFAULT_LEVEL, log_to_stderr
from ovr.errors import OvrError

__all__ = ["main", "make_parser"]

# Modules of this package. Only the module of the command is imported, to start fast.
_COMMANDS: Final = (
    "dump", "restore", "move", "warm", "plan", "states", "ps", "list", "check", "agent", "lab",
    "demo",
)  # fmt: skip
_AS_CRIU: Final = ("dump", "restore", "move")
"""Commands with options of CRIU's, whose -v is CRIU's."""

_WIDTH: Final = 92
_EPILOG: Final = """\
VM is libvirt:DOMAIN, name:NAME (QEMU's -name), qmp:PATH (a QMP socket), pid:N (a QEMU process)
or lab:NAME; `ovr list` shows the VMs of this host.
ADDR is vsock:CID[:PORT], unix:PATH[:PORT] or serial:PATH; not needed for lab VMs.

exit codes:
  0 done   1 failed and undone, VM unharmed   2 usage   3 VM or agent not reachable
  4 check failed   5 images cannot be restored   6 images damaged   7 verify mismatch
  8 container ended, archive incomplete   9 move in doubt
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if arguments is None:
        process.set_up()
        if words and words[0] in _AS_CRIU:
            process.hurry()
            process.keep_memory()
    parser = make_parser(words[0] if words else None)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        whose = "ovr or criu (3.17 to 4.2)" if words[0] in _AS_CRIU else "ovr"
        parser.error(f"not an option of {whose}: {' '.join(unknown)}")
    log_to_stderr(getattr(options, "log_level", DEFAULT_LEVEL + options.verbose))
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except OvrError as error:
        output.error(error, as_json=options.json)
        return error.exit_code
    except KeyboardInterrupt:
        print("ovr: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        output.give_up_stdout()
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        output.give_up_stdout()
        where = error.filename or "standard output"
        output.error(OvrError(f"{where}: {error.strerror}", "free space there"), as_json=False)
        return 1
    return code


class _Command(argparse.ArgumentParser):
    # Every command's help ends with examples and the common epilogue.
    def __init__(self, *, examples: str = "", **options: Any) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        lines = textwrap.indent(textwrap.dedent(examples), "  ").rstrip()
        epilog = f"examples:\n{lines}\n\n{_EPILOG}" if examples else _EPILOG
        options["description"] = textwrap.fill(options.get("description") or "", _WIDTH)
        super().__init__(epilog=epilog, formatter_class=raw, allow_abbrev=False, **options)


class _Version(argparse.Action):
    # Reads the package's metadata, which takes milliseconds, only when used.
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        from importlib.metadata import version  # noqa: PLC0415 - slow, and not needed by commands

        print(f"ovr {version('ovr')}")
        parser.exit()


def _add(commands: Any, name: str, module: ModuleType) -> None:
    # HELP is a line, a description and examples, with blank lines between them.
    line, description, examples = module.HELP.split("\n\n")
    parser = commands.add_parser(
        name, help=line, description=" ".join(description.split()), examples=examples,
        usage=getattr(module, "USAGE", None),
    )  # fmt: skip
    if hasattr(module, "add"):
        module.add(parser)
    if hasattr(module, "run"):
        if name not in _AS_CRIU:  # their -v is CRIU's
            output.common(parser)
        parser.set_defaults(run=module.run)


def make_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the whole command line, or, faster, of the command `only`.

    An unknown command gets the whole parser, which reports it.
    """
    parser = _Command(
        prog="ovr",
        description=(
            "Save processes of a running QEMU VM, restore them into one, or move them from one to"
            " another, from outside."
        ),
        examples="""\
            ovr list
            ovr check --vm libvirt:web
            ovr dump -t 4242 -D images/ --vm libvirt:db
            ovr restore -D images/ --vm libvirt:web
            """,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", parser_class=_Command
    )
    for name in (only,) if only in _COMMANDS else _COMMANDS:
        _add(commands, name, import_module(f"ovr.cli.{name}"))
    completion.add(commands, make_parser)
    return parser
