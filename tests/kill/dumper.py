"""A dump that tells where it is, and waits there.

``python -m tests.kill.dumper VM PID IMAGES POINT`` does for a dump what `restorer` does for a
restore.
"""

import sys
from pathlib import Path

import ovr
from ovr.attempt import in_holds
from ovr.dump import dump
from ovr.errors import OvrError
from ovr.vm import hold
from tests.kill.restorer import Events, watch


def main() -> int:
    spec, pid, images, point = sys.argv[1:]
    events = Events(int(point))
    in_holds.HOLD_BYTES = 1 << 20  # many holds: many points
    hold.BOUND_SECONDS = 600.0  # it waits in them  # type: ignore[misc]
    watch(events)
    try:
        with ovr.attach(spec) as vm:
            dump(vm, int(pid), Path(images), verify="full")
    except OvrError as error:
        print(f"failed {type(error).__name__}: {error}", flush=True)
        return error.exit_code
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
