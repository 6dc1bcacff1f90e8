"""A service with many threads: hash chains, a queue, locks, timers, and 60 MB of objects.

Its clients send one word a line; each answer is one line of JSON.
"""

import gc
import hashlib
import json
import os
import queue
import random
import socketserver
import subprocess
import sys
import threading
import time

CHAINS = 8
VERIFIERS = 2
OBJECTS = 100_000
BULK = 16 << 20
LINKS = 20  # of a chain, between two rests
REST = 0.02
TICK = 0.05


class Chain(threading.Thread):
    """Each link is the hash of the one before. What was made goes to the verifiers."""

    def __init__(self, number, work):
        super().__init__(daemon=True)
        self.work = work
        self.lock = threading.Lock()
        self.length = 0
        self.link = hashlib.sha256(b"chain %d" % number).digest()

    def run(self):
        while True:
            with self.lock:
                first = self.link
                for _ in range(LINKS):
                    self.link = hashlib.sha256(self.link).digest()
                self.length += LINKS
                last = self.link
            self.work.put((first, last))
            time.sleep(REST)

    def state(self):
        with self.lock:
            return self.length, self.link.hex()


class Verifier(threading.Thread):
    """Takes pieces of chains out of the queue and computes them again."""

    def __init__(self, work):
        super().__init__(daemon=True)
        self.work = work
        self.right = 0
        self.wrong = 0

    def run(self):
        while True:
            first, last = self.work.get()
            for _ in range(LINKS):
                first = hashlib.sha256(first).digest()
            if first == last:
                self.right += 1
            else:
                self.wrong += 1
            self.work.task_done()


class Clock:
    """A timer that sets the next one; who waits for a tick is woken by it."""

    def __init__(self):
        self.ticks = 0
        self.changed = threading.Condition()
        self.tick()

    def tick(self):
        with self.changed:
            self.ticks += 1
            self.changed.notify_all()
        timer = threading.Timer(TICK, self.tick)
        timer.daemon = True
        timer.start()

    def wait(self, ticks):
        with self.changed:
            goal = self.ticks + ticks
            return self.changed.wait_for(lambda: self.ticks >= goal, timeout=60)


class Program:
    """All of the service's state, and what clients can ask for."""

    def __init__(self):
        self.objects = {f"key {n}": expected(n) for n in range(OBJECTS)}
        self.bulk = bytearray(random.Random(BULK).randbytes(BULK))
        self.local = threading.local()
        self.work = queue.Queue(maxsize=64)
        self.chains = [Chain(number, self.work) for number in range(CHAINS)]
        self.verifiers = [Verifier(self.work) for _ in range(VERIFIERS)]
        self.clock = Clock()
        for thread in [*self.chains, *self.verifiers]:
            thread.start()

    def state(self):
        return {
            "pid": os.getpid(),
            "chains": [chain.state() for chain in self.chains],
            "alive": sum(thread.is_alive() for thread in [*self.chains, *self.verifiers]),
            "right": sum(verifier.right for verifier in self.verifiers),
            "wrong": sum(verifier.wrong for verifier in self.verifiers),
            "ticks": self.clock.ticks,
        }

    def memory(self):
        """Look at every object."""
        wrong = sum(self.objects[f"key {n}"] != expected(n) for n in range(OBJECTS))
        same = self.bulk == random.Random(BULK).randbytes(BULK)
        gc.collect()
        return {"objects": len(self.objects), "wrong": wrong, "bulk": same}

    def wait(self):
        return {"woken": self.clock.wait(10)}

    def threads(self):
        """Start new threads, which work with locals of their own."""
        sums = []

        def add(first):
            self.local.total = 0
            for number in range(first, first + 1000):
                self.local.total += number
            sums.append(self.local.total)

        new = [threading.Thread(target=add, args=(1000 * n,)) for n in range(8)]
        for thread in new:
            thread.start()
        for thread in new:
            thread.join()
        return {"sum": sum(sums)}

    def child(self):
        """Start a child that answers over a pipe, and fork one that sees our objects."""
        command = [sys.executable, "-c", "print(sum(range(1000)))"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        pid = os.fork()
        if pid == 0:
            os._exit(42 if self.objects["key 777"] == expected(777) else 1)
        return {
            "printed": int(done.stdout),
            "status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]),
        }


def expected(number):
    return (number, number * number, str(number) * 5)


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            word = line.decode().strip()
            self.wfile.write(json.dumps(getattr(self.server.program, word)()).encode() + b"\n")


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


if __name__ == "__main__":
    with Server(("127.0.0.1", 7001), Handler) as server:
        server.program = Program()
        server.serve_forever()
