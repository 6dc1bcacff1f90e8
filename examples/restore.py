#!/usr/bin/env python3
"""Restore checkpoints into a VM, one after the other, and print how long each one held the VM.

    restore.py VM IMAGES...

VM is a name shown by ``ovr list``. A checkpoint that cannot be restored is reported and skipped;
the VM is unharmed, and the next checkpoint is restored.
"""

import sys
from pathlib import Path

import ovr
from ovr.errors import OvrError, Unreachable


def main(spec: str, directories: list[str]) -> int:
    """Return the exit code."""
    failed = 0
    try:
        with ovr.attach(spec) as vm:
            for directory in map(Path, directories):
                try:
                    report = vm.restore(directory, criu_options=["--tcp-established"])
                except Unreachable:
                    raise  # no link to the agent: the other checkpoints would fail too
                except OvrError as error:
                    failed += 1
                    print(f"{directory}: {error.kind}: {error}", file=sys.stderr)
                    continue
                held = report.held["seconds"] * 1000
                print(f"{directory}: pid {report.pid}, VM held for {held:.0f} ms", flush=True)
    except OvrError as error:
        print(f"{spec}: {error} ({error.hint})", file=sys.stderr)
        return error.exit_code
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
