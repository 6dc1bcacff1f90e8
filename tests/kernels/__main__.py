"""Restore the pool of programs on every kernel and machine of the matrix, and record it.

``python -m tests.kernels [--list] [--only WORD]… [--programs NAME,…] [--missing]``

The record is docs/kernel-matrix.json; docs/support-matrix.md is made of it.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ovr.errors import OvrError
from ovr.lab.cache import cache_directory
from tests import support_matrix
from tests.kernels.run import REFUSED, Outcome, run
from tests.kernels.setups import SETUPS, Setup
from tests.vm import pool


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the setups, and run none")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORDS",
        help="setups with all of these words in their names; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--missing", action="store_true", help="setups that have no record yet")
    parser.add_argument(
        "--programs", default=",".join(pool.BY_NAME), metavar="NAME,…", help="of the pool; all"
    )
    parser.add_argument("--prefix", default="kernels", help="of the VM's name")
    return parser.parse_args(arguments)


def chosen(asked: argparse.Namespace) -> list[Setup]:
    """Return the setups that the command line means."""
    recorded = support_matrix.kernels() if asked.missing else {}
    return [
        setup
        for setup in SETUPS
        if setup.name not in recorded
        and (not asked.only or any(meant(words, setup) for words in asked.only))
    ]


def meant(words: str, setup: Setup) -> bool:
    """Whether words of the command line name the setup, or setups of which it is one."""
    if any(words == one.name for one in SETUPS):
        return words == setup.name
    return {*words.split()} <= {*setup.name.split()}


def perform(setup: Setup, asked: argparse.Namespace) -> tuple[Outcome, bool]:
    """Run a setup; return what came of it, and whether that is right."""
    programs = [pool.BY_NAME[name] for name in asked.programs.split(",")]
    with tempfile.TemporaryDirectory(prefix="ovr-kernels-", dir=cache_directory()) as scratch:
        try:
            outcome = run(
                f"{asked.prefix}-{os.getpid()}", setup, programs, Path(scratch),
                say=lambda line: print(f"    {line}", flush=True),
            )  # fmt: skip
        except (OvrError, OSError) as error:
            outcome = Outcome(trouble=str(error))
    if setup.refused:
        return outcome, outcome.trouble.startswith(REFUSED)
    return outcome, not outcome.failed


def main() -> int:
    asked = parse()
    setups = chosen(asked)
    if asked.list:
        print(*(setup.name for setup in setups), sep="\n")
        return 0
    passed = failed = 0
    for setup in setups:
        print(setup.name, flush=True)
        started = time.monotonic()
        outcome, right = perform(setup, asked)
        passed, failed = passed + right, failed + (not right)
        verdict = "passed" if right else f"FAILED {outcome.trouble}"
        print(f"  {verdict}, {time.monotonic() - started:.0f} s", flush=True)
        support_matrix.record_kernel(
            setup.name,
            {"suite": setup.suite, "package": setup.kernel, "machine": setup.machine,
             **asdict(outcome)},
        )  # fmt: skip
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0 or not setups)


if __name__ == "__main__":
    sys.exit(main())
