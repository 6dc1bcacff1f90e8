"""A stand-in for `tests.kill.mover`: ``python -m tests.unit.kill_stand_in HOLDS STEP``.

It does nothing, and tells the steps of something with so many holds.
"""

import sys

from tests.kill.restorer import Events


def main() -> int:
    holds, step = sys.argv[1:]
    events = Events(step)
    events("begin of copy")
    for _ in range(int(holds)):
        events.holds += 1
        events("the VM is held")
        events("the VM is let go")
        events.holds -= 1
    events("end of copy")
    events("begin of commit")
    events("before sending go")
    events("after sending go")
    events("end of commit")
    events("begin of cleanup")
    events("end of cleanup")
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
