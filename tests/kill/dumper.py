"""A dump that tells where it is, and waits there.

``python -m tests.kill.dumper VM PID IMAGES ROUNDS STEP`` does for a dump, with so many rounds of
pre-copies, what `restorer` does for a restore.
"""

import sys
from pathlib import Path

from ovr.dump import dump
from tests.kill.restorer import Events, perform


def main() -> int:
    spec, pid, images, rounds, step = sys.argv[1:]
    return perform(
        [spec],
        Events(step),
        lambda vm: dump(vm, int(pid), Path(images), pre_copies=int(rounds), verify="full"),
    )


if __name__ == "__main__":
    sys.exit(main())
