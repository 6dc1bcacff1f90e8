"""A client of `python_service.py` that runs in the guest."""

import hashlib
import json
import socket
import sys
import time
from pathlib import Path

NOTED = Path("/srv/python/noted")
CHAINS = 8
THREADS = 10
PATIENCE = 120.0


class Service:
    def __init__(self):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", 7001), timeout=PATIENCE)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, "the service does not listen"
                time.sleep(0.2)
        self.file = self.socket.makefile("rw")

    def __call__(self, word):
        print(word, file=self.file, flush=True)
        line = self.file.readline()
        assert line, f"the service hung up at {word}"
        return json.loads(line)


def right(state):
    """Whether a state is one that the program can be in: its chains are computed anew."""
    assert state["alive"] == THREADS, state
    assert state["wrong"] == 0, state
    assert len(state["chains"]) == CHAINS
    for number, (length, found) in enumerate(state["chains"]):
        link = hashlib.sha256(b"chain %d" % number).digest()
        for _ in range(length):
            link = hashlib.sha256(link).digest()
        assert link.hex() == found, f"chain {number} is wrong at length {length}"


def later(old, new):
    """Whether every thread has worked between two states."""
    assert new["pid"] == old["pid"]
    for number, (before, after) in enumerate(zip(old["chains"], new["chains"], strict=True)):
        assert after[0] > before[0], f"chain {number} does not grow"
    assert new["right"] > old["right"], "nothing is verified"
    assert new["ticks"] > old["ticks"], "timers do not fire"


def expect(service, word, **wanted):
    found = service(word)
    assert found == wanted, f"{word}: {found}"


def note(service):
    expect(service, "wait", woken=True)
    state = service("state")
    right(state)
    NOTED.write_text(json.dumps(state))


def check(service):
    state = service("state")
    right(state)
    later(json.loads(NOTED.read_text()), state)
    expect(service, "memory", objects=100_000, wrong=0, bulk=True)
    expect(service, "wait", woken=True)
    expect(service, "threads", sum=sum(range(8000)))
    expect(service, "child", printed=499_500, status=42)
    expect(Service(), "wait", woken=True)  # a second client, beside this one
    after = service("state")
    right(after)
    later(state, after)


if __name__ == "__main__":
    {"note": note, "check": check}[sys.argv[1]](Service())
