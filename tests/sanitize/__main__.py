"""Run tests with what is native checked: ``python -m tests.sanitize sanitizers|valgrind``.

``sanitizers`` copies the tree, builds the extension, the agent and a Python to run them with
AddressSanitizer and UndefinedBehaviorSanitizer, and runs the tests that are there, in the copy.
``valgrind`` runs the agent, and CRIU's action script, which is the agent too, under valgrind's
memcheck: on this machine with a stand-in for CRIU, and in a VM with CRIU itself.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from tests.sanitize.build import BUILD, ROOT, build_tree

NATIVE = ("tests/unit", "tests/fuzz")
# Tests of the agent and of guest memory, on one kernel: others make little difference to them.
IN_VMS = ("tests/vm/test_failures.py", "tests/vm/test_restore.py", "tests/vm/test_pool.py")
ONE_SUITE = "not bookworm and not forky"
# They build packages of the tree in its repository, which the copy is not.
NOT_IN_A_COPY = ("--ignore=tests/unit/test_packaging.py", "--ignore=tests/vm/test_readme.py")
UNDER_VALGRIND = (
    "tests/unit/test_agent_restore.py", "tests/unit/test_agent_restore_end.py",
    "tests/unit/test_agent_hostile.py", "tests/unit/test_agent_lab.py",
    "tests/sanitize/test_valgrind.py",
)  # fmt: skip


@dataclass
class Runs:
    """Runs of pytest, and what came of them.

    Attributes:
        python: that runs it.
        place: the tree in which.
        environment: what it has besides ours.
        counts: of outcomes.
    """

    python: Path
    place: Path
    environment: Mapping[str, str]
    counts: Counter[str] = field(default_factory=Counter)

    def run(self, tests: str, *options: str) -> None:
        """Run one file or directory."""
        result = BUILD / "result.xml"
        result.unlink(missing_ok=True)
        started = time.monotonic()
        command = [self.python, "-m", "pytest", "-q", "-rf", tests, *NOT_IN_A_COPY, *options]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", f"--junitxml={result}"], cwd=self.place,
            env={**os.environ, **self.environment}, check=False,
        )  # fmt: skip
        found = _counts(result)
        # 1 is told by the counts; anything else means that pytest itself came to an end.
        if done.returncode not in (0, 1) or not found["passed"]:
            found["failed"] += 1
        print(
            f"{tests}: {found['passed']} passed, {found['failed']} failed,"
            f" {found['skipped']} skipped in {time.monotonic() - started:.0f} s",
            flush=True,
        )
        self.counts += found


def _counts(result: Path) -> Counter[str]:
    if not result.exists():
        return Counter()
    counts: Counter[str] = Counter()
    for case in ElementTree.parse(result).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        bad = kinds & {"failure", "error"}
        counts["failed" if bad else "skipped" if "skipped" in kinds else "passed"] += 1
    return counts


def sanitizers(tests: Sequence[str], everything: bool) -> Runs:
    """Run tests with AddressSanitizer and UndefinedBehaviorSanitizer."""
    tree, python = build_tree()
    runs = Runs(python, tree, {"OVR_SANITIZE": "1", "PYTHONPATH": str(tree)})
    for name in tests or (*NATIVE, *(("tests/vm",) if everything else IN_VMS)):
        narrow = name in IN_VMS and not everything
        runs.run(name, *(("-k", ONE_SUITE) if narrow else ()))
    return runs


def valgrind(tests: Sequence[str]) -> Runs:
    """Run the agent's tests under valgrind."""
    BUILD.mkdir(parents=True, exist_ok=True)
    runs = Runs(Path(sys.executable), ROOT, {"OVR_VALGRIND": "1"})
    for name in tests or UNDER_VALGRIND:
        runs.run(name)
    return runs


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("tool", choices=("sanitizers", "valgrind"))
    parser.add_argument("tests", nargs="*", help="instead of the usual ones")
    parser.add_argument("--all", action="store_true", help="sanitizers: all tests on VMs")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    if options.tool == "sanitizers":
        runs = sanitizers(options.tests, options.all)
    else:
        runs = valgrind(options.tests)
    print(f"{runs.counts['passed']} passed, {runs.counts['failed']} failed")
    return 1 if runs.counts["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
