"""A client of `JvmService.java` that runs in the guest."""

import socket
import sys
import time
from pathlib import Path

NOTED = Path("/srv/jvm/noted")
CHAINS = 4
PATIENCE = 300.0


class Service:
    def __init__(self):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", 7002), timeout=PATIENCE)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, "the service does not listen"
                time.sleep(0.5)
        self.file = self.socket.makefile("rw")

    def __call__(self, word):
        print(word, file=self.file, flush=True)
        line = self.file.readline()
        assert line, f"the service hung up at {word}"
        return values(line)


def values(line):
    return dict(word.split("=") for word in line.split())


def later(old, new):
    """Whether every thread has worked between two states, without a fault."""
    assert new["pid"] == old["pid"]
    assert (new["alive"], new["wrong"]) == (str(CHAINS), "0"), new
    for number in range(CHAINS):
        before, after = (int(one[f"chain{number}"].split(":")[0]) for one in (old, new))
        assert after > before, f"chain {number} does not grow"
    for name in ("lists", "ticks"):
        assert int(new[name]) > int(old[name]), f"{name} do not grow: {new}"


def memory(service):
    found = service("memory")
    wanted = {"words": str(64 << 17), "entries": "50000", "bad": "0", "chains": str(CHAINS)}
    assert found == wanted, found


def note(service):
    memory(service)
    state = service("state")
    NOTED.write_text(" ".join(f"{name}={value}" for name, value in state.items()))


def check(service):
    state = service("state")
    later(values(NOTED.read_text()), state)
    memory(service)
    collected = service("gc")
    assert int(collected["more"]) > 0, collected
    memory(service)
    compiled = service("compile")
    wanted = {"first": str(cold(12345)), "different": "0", "compiled": "true"}
    assert compiled == wanted, compiled
    threads = service("threads")
    wanted = {"all": "true", "sum": str(sum(range(8000))), "parallel": str(sum(range(100_000)))}
    assert threads == wanted, threads
    child = service("child")
    assert child == {"printed": "499500", "status": "0"}, child
    later(state, Service()("state"))  # a second client, beside this one


def cold(x):
    """As the program's method of that name, whose arithmetic is of signed 64 bits."""
    mask = (1 << 64) - 1
    total = 0
    for i in range(100):
        word, turn = (x * 31 + i) & mask, i & 63
        total += (word << turn | word >> (64 - turn)) & mask
    total &= mask
    return total - (1 << 64) if total >> 63 else total


if __name__ == "__main__":
    {"note": note, "check": check}[sys.argv[1]](Service())
