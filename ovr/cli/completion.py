"""``ovr completion bash|zsh``: print a completion script for a shell."""

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from ovr.cli.output import common, document

__all__ = ["add"]

_FILES: Final = ("FILE", "FILE|DIR")


def add(commands: Any, make_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Add the command to the parser; `make_parser` returns the whole parser."""
    parser = commands.add_parser(
        "completion",
        help="print a completion script for bash or zsh",
        description="Print the completion script of a shell.",
        examples="""\
            ovr completion bash > /usr/share/bash-completion/completions/ovr
            ovr completion zsh > /usr/local/share/zsh/site-functions/_ovr
            """,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    common(parser)
    parser.set_defaults(run=lambda options: _run(options, make_parser()))


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import shtab  # noqa: PLC0415 - slow, and not needed by other commands

    _complete_files(parser, files=shtab.FILE, directories=shtab.DIRECTORY)
    text = shtab.complete(parser, options.shell)
    if options.json:
        document("ovr.completion/1", {"shell": options.shell, "text": text})
    else:
        sys.stdout.write(text + "\n")
    return 0


def _complete_files(
    parser: argparse.ArgumentParser, *, files: Mapping[str, Any], directories: Mapping[str, Any]
) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, files=files, directories=directories)
        elif action.metavar == "DIR":
            action.complete = directories  # type: ignore[attr-defined]
        elif action.metavar in _FILES:
            action.complete = files  # type: ignore[attr-defined]
