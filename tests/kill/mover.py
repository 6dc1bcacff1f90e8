"""A move that tells where it is, and waits there.

``python -m tests.kill.mover SOURCE DESTINATION PID STEP`` does for a move what `restorer` does for
a restore. Names of messages begin with ``a`` for the source, ``b`` for the destination.
"""

import sys
import tempfile
from pathlib import Path

import ovr
from ovr.attempt.attempt import agent_address
from ovr.guest.client.agent import Agent
from ovr.move import scratch
from tests.kill.restorer import Events, perform


def main() -> int:
    *specs, pid, step = sys.argv[1:]
    sides: dict[str, str] = {}
    # Other moves on this host have theirs in the usual place.
    scratch._MEMORY = Path(tempfile.gettempdir())  # type: ignore[misc]

    def move(source: ovr.Vm, destination: ovr.Vm) -> None:
        sides[agent_address(source, None)] = "a "
        sides[agent_address(destination, None)] = "b "
        source.move(int(pid), destination, verify="full")

    def side(agent: Agent) -> str:
        return sides[agent.address]

    return perform(specs, Events(step), move, side)


if __name__ == "__main__":
    sys.exit(main())
