"""Rounds of lies: ``python -m tests.liar [--rounds N] [--seed S] [WHAT ...]``."""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ovr.lab import demo
from tests.liar.rounds import SUBJECTS, WHAT, Liar, Subject


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.liar", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", default="1")
    parser.add_argument("what", nargs="*", help=f"what is lied about: {', '.join(WHAT)}")
    options = parser.parse_args(arguments)
    unknown = {*options.what} - {*WHAT}
    if unknown:
        parser.error(f"nobody lies about {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    options = parse()
    name = f"liar-{os.getpid()}"
    failed = 0
    with tempfile.TemporaryDirectory(prefix="ovr-liar-") as place:
        with demo.lab_vm(f"{name}-a", memory="1G", share=Path(place)) as vm:
            subjects = [Subject.dumped(one, vm, Path(place)) for one in SUBJECTS]
        scratch = Path(place, "scratch")
        scratch.mkdir()
        with Liar(f"{name}-b", subjects, scratch) as liar:
            for number in range(options.rounds):
                chosen = options.what or WHAT
                what = chosen[number % len(chosen)]
                started = time.monotonic()
                outcome = liar.round(what, f"{options.seed}/{number}")
                failed += bool(outcome.wrong)
                seconds = time.monotonic() - started
                print(f"{number:4} {seconds:5.1f} s  {outcome.text}", flush=True)
                if outcome.wrong:
                    print(f"     FAILED: {outcome.wrong}", flush=True)
            print(f"{liar.died} guests died of what they said")
    print(f"{options.rounds - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
