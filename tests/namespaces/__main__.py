"""Writes docs/namespaces.md: program by namespace by suite, CRIU alone beside ovr.

::

    make namespaces NAMESPACES="--suite trixie --case all+user/tree"
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from ovr.lab.image import SUITES
from tests.namespaces.journeys import Case, journeys
from tests.namespaces.table import render
from tests.vm import pool

DOCS = Path(__file__).parents[2] / "docs"
RECORD, TABLE = DOCS / "namespaces.json", DOCS / "namespaces.md"
ALL = ("mount", "pid", "net", "ipc", "uts", "time", "cgroup")
FLAVOURS = {
    **{word: (word,) for word in ("pid", "mount", "net", "ipc", "uts", "time", "cgroup", "user")},
    "user+pid+mount": ("user", "pid", "mount"),
    "all": ALL,
    "all+user": ("user", *ALL),
}
WHOLE = ("all", "all+user")
"""Flavours that every program is tried in; the others only some."""
SOME = ("private", "tree")
NESTED = pool.Program("nested", 16, tree=True, source="../namespaces/nested", args={"": ("net",)})


def cases(suite: str, chosen: list[str]) -> list[Case]:
    """Return what is to be tried: all, or the chosen ones, each FLAVOUR/PROGRAM."""
    found = []
    for flavour, words in FLAVOURS.items():
        for program in (*pool.POOL, NESTED):
            if program.namespaces or suite in program.unsupported or "--pid" in program.launcher:
                continue
            nested = program.name == NESTED.name
            if flavour in WHOLE or (program.name in SOME and not nested):
                plain = replace(program, launcher=())
                found.append(Case(flavour, pool.within(plain, *words)))
    return [one for one in found if not chosen or f"{one.flavour}/{one.program.name}" in chosen]


def main() -> int:
    """Run the chosen cases, record them and write the table; 1 if ovr fails where CRIU does not."""
    parser = argparse.ArgumentParser(prog="python -m tests.namespaces", description=__doc__)
    parser.add_argument("--suite", action="append", choices=SUITES, default=[])
    parser.add_argument("--case", action="append", default=[], help="NAMESPACES/PROGRAM")
    parser.add_argument("--prefix", default=f"namespaces-{os.getpid()}-", help="of the VMs' names")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("ovr").setLevel(logging.WARNING)
    for suite in [] if options.table else options.suite or SUITES:
        chosen = cases(suite, options.case)
        with tempfile.TemporaryDirectory(prefix=f"namespaces-{suite}-") as share:
            for name, outcome in journeys(suite, chosen, Path(share), f"{options.prefix}{suite}-"):
                logging.info("%s %s: %s", suite, name, outcome)
                record(suite, {name: asdict(outcome)})
    recorded = json.loads(RECORD.read_text())
    TABLE.write_text(render(recorded))
    worse = [
        f"{suite} {name}: {one['ovr']}"
        for suite, outcomes in recorded.items()
        for name, one in outcomes.items()
        if one["criu"] == "" and one["ovr"]
    ]
    print("\n".join(["CRIU alone passes, ovr does not:", *worse]) if worse else "none is worse")
    return 1 if worse else 0


def record(suite: str, outcomes: dict[str, dict[str, str | None]]) -> None:
    """Note outcomes beside those that are recorded."""
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    recorded[suite] = {**recorded.get(suite, {}), **outcomes}
    RECORD.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
