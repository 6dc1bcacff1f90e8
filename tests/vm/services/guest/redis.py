"""A client of redis that runs in the guest: `load` fills the data set, `check` asks for it."""

import random
import socket
import sys
import time

COUNT = 16_000
SIZE = 4400
BATCH = 50
PATIENCE = 120.0


class Redis:
    """One connection; called with the words of a command it returns the answer."""

    def __init__(self):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", 6379), timeout=PATIENCE)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, "redis does not listen"
                time.sleep(0.1)
        self.file = self.socket.makefile("rb")

    def __call__(self, *words):
        return self.many([words])[0]

    def many(self, commands):
        """Send all commands, then read all answers."""
        text = bytearray()
        for words in commands:
            text += b"*%d\r\n" % len(words)
            for word in words:
                data = word if isinstance(word, bytes) else str(word).encode()
                text += b"$%d\r\n%b\r\n" % (len(data), data)
        self.socket.sendall(text)
        return [self.answer() for _ in commands]

    def answer(self):
        line = self.file.readline()
        assert line.endswith(b"\r\n"), f"redis hung up: {line!r}"
        kind, rest = line[:1], line[1:-2]
        assert kind != b"-", f"redis refuses: {rest.decode()}"
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self.file.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return [self.answer() for _ in range(int(rest))]
        return rest


def value(number):
    """The value of a key follows from the key."""
    return random.Random(number).randbytes(SIZE)


def batches():
    for first in range(0, COUNT, BATCH):
        yield range(first, first + BATCH)


def load(redis):
    for batch in batches():
        redis.many([("SET", f"key:{number}", value(number)) for number in batch])
    redis.many(
        [("ZADD", "board", number * 37 % 1000, f"player {number}") for number in range(1000)]
    )
    redis.many([("HSET", "fields", number, number * number) for number in range(1000)])
    assert redis("DBSIZE") == COUNT + 2


def check(redis):
    assert redis("PING") == b"PONG"
    old_data(redis)
    new_data(redis)
    timers(redis)
    saving(redis)


def old_data(redis):
    assert redis("DBSIZE") == COUNT + 2, redis("DBSIZE")
    for batch in batches():
        found = redis("MGET", *(f"key:{number}" for number in batch))
        for number, content in zip(batch, found, strict=True):
            assert content == value(number), f"key:{number} is wrong"
    players = sorted(range(1000), key=lambda number: number * 37 % 1000)
    assert redis("ZRANGE", "board", 0, -1) == [b"player %d" % number for number in players]
    assert redis("HGET", "fields", 999) == b"998001"


def new_data(redis):
    for number in range(500):
        redis("SET", f"new:{number}", value(COUNT + number))
    for number in range(500):
        assert redis("GET", f"new:{number}") == value(COUNT + number), f"new:{number} is wrong"
    assert redis("EVAL", "return redis.call('INCRBY', KEYS[1], 42)", 1, "sum") == 42
    assert redis("DEL", "sum", *(f"new:{number}" for number in range(500))) == 501


def timers(redis):
    redis("SET", "short", "lived", "PX", 300)
    time.sleep(0.6)
    assert redis("GET", "short") is None, "keys do not expire"
    assert redis("DBSIZE") == COUNT + 2


def info(redis):
    lines = redis("INFO").decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def saving(redis):
    """A child writes the data set while the parent goes on."""
    saves = int(info(redis)["rdb_saves"])
    redis("BGSAVE")
    deadline = time.monotonic() + PATIENCE
    while (now := info(redis))["rdb_bgsave_in_progress"] != "0":
        assert time.monotonic() < deadline, "BGSAVE does not end"
        redis("SET", "key:0", value(0))
        time.sleep(0.1)
    assert now["rdb_last_bgsave_status"] == "ok", now
    assert int(now["rdb_saves"]) == saves + 1, now


if __name__ == "__main__":
    {"load": load, "check": check}[sys.argv[1]](Redis())
