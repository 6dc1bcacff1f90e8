"""A restore that tells where it is, and waits there.

``python -m tests.kill.restorer VM IMAGES STEP`` runs in a process of its own, to be killed. Every
step is an event: phases of the restore begin and end, messages are sent to the agent and answered,
the VM is held, memory is written. Each is a line on stdout, "event NUMBER HELD STEP"; at STEP (see
`Step`; empty for none) it waits for a line on stdin before it goes on. The last line is "done" or
"failed KIND: WHY".
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import ovr
from ovr.attempt import in_holds, settings
from ovr.attempt.copier import Copier
from ovr.attempt.stopwatch import Stopwatch
from ovr.errors import OvrError
from ovr.guest.client.agent import Agent
from ovr.guest.dump_protocol import Track
from ovr.guest.message import Message
from ovr.guest.protocol import Alive
from ovr.vm import hold
from ovr.vm.hold import Holder
from tests.kill.steps import Steps


class Events:
    """Counts and tells events, and waits at that of the step `wait_at`."""

    def __init__(self, wait_at: str) -> None:
        self._wait_at = wait_at
        self._steps = Steps()
        self._count = 0
        self._main = threading.current_thread()
        self.holds = 0

    def __call__(self, name: str) -> None:
        if threading.current_thread() is not self._main:
            return
        step = str(self._steps(name))
        print(f"event {self._count} {int(self.holds > 0)} {step}", flush=True)
        if step == self._wait_at:
            sys.stdin.readline()
        self._count += 1


def around(events: Events, owner: Any, method: str, name: Callable[..., str | None]) -> None:
    """Make a method two events; `name` says how a call is called, None for not at all."""
    original = getattr(owner, method)

    def told(*args: Any, **kwargs: Any) -> Any:
        called = name(*args, **kwargs)
        if called is None:
            return original(*args, **kwargs)
        events(f"before {called}")
        result = original(*args, **kwargs)
        events(f"after {called}")
        return result

    setattr(owner, method, told)


def watch_phases(events: Events) -> None:
    original = Stopwatch.__call__

    @contextmanager
    def phase(watch: Stopwatch, name: str) -> Iterator[None]:
        events(f"begin of {name}")
        with original(watch, name):
            yield
        events(f"end of {name}")

    Stopwatch.__call__ = phase  # type: ignore[method-assign]


def watch_holds(events: Events) -> None:
    original = Holder.held

    @contextmanager
    def held(holder: Holder) -> Iterator[None]:
        with original(holder):
            events.holds += 1
            events("the VM is held")
            yield
            events("the VM is let go")
            events.holds -= 1

    Holder.held = held  # type: ignore[method-assign]


def sent(_: Agent, message: Message) -> str | None:
    if isinstance(message, Alive):
        return None
    stop = isinstance(message, Track) and message.stop
    return f"sending {message.op}{' and stop' if stop else ''}"


def watch(events: Events, side: Callable[[Agent], str]) -> None:
    """Make events of all that a restore does; `side` begins the names of an agent's."""
    watch_phases(events)
    watch_holds(events)

    def named(agent: Agent, message: Message) -> str | None:
        words = sent(agent, message)
        return words and side(agent) + words

    around(events, Agent, "_send", named)
    around(events, Agent, "_receive", lambda agent, *_: f"{side(agent)}hearing the agent")
    around(events, Copier, "_copy", lambda *_: "copying")
    around(events, settings, "_rehearse", lambda *_: "reading the state")


def perform(
    specs: Sequence[str],
    events: Events,
    act: Callable[..., object],
    side: Callable[[Agent], str] = lambda agent: "",
) -> int:
    """Do something to VMs, watched; return what the command would exit with.

    Args:
        specs: the VMs.
        events: gets the events.
        act: called with the VMs.
        side: as for `watch`.
    """
    in_holds.HOLD_BYTES = 1 << 20  # many holds: many points
    hold.BOUND_SECONDS = 600.0  # it waits in them  # type: ignore[misc]
    watch(events, side)
    try:
        with ExitStack() as stack:
            act(*[stack.enter_context(ovr.attach(spec)) for spec in specs])
    except OvrError as error:
        print(f"failed {type(error).__name__}: {error}", flush=True)
        return error.exit_code
    print("done", flush=True)
    return 0


def main() -> int:
    spec, images, step = sys.argv[1:]
    return perform([spec], Events(step), lambda vm: vm.restore(images, verify="full"))


if __name__ == "__main__":
    sys.exit(main())
