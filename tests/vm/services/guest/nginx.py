"""A client of nginx that runs in the guest: `make` the files, `note` the counters, `check` all."""

import http.client
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PLACE = Path("/srv/nginx")
CONFIGURATION = PLACE / "nginx.conf"
NOTED = PLACE / "noted"
FILES = 60
REQUESTS = 300
WORKERS = 4
PATIENCE = 120.0


def content(number):
    source = random.Random(number)
    return source.randbytes(source.randrange(1, 200_000))


def get(path):
    """Return the body, the worker's pid and the configuration's generation."""
    connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, f"{path}: {answer.status}"
        return body, int(answer.headers["X-Worker"]), int(answer.headers["X-Generation"])
    finally:
        connection.close()


def counters():
    """Return how many connections were accepted, and how many requests there were."""
    words = get("/status")[0].decode().split()
    first = words.index("requests") + 1
    accepted, handled, requests = map(int, words[first : first + 3])
    assert accepted == handled, "nginx dropped connections"
    return accepted, requests


def fetch(number):
    number %= FILES
    body, worker, generation = get(f"/{number}.bin")
    assert body == content(number), f"{number}.bin is wrong"
    return worker, generation


def fetch_all():
    """Return the workers that answered, and the generations of their configuration."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(fetch, range(REQUESTS)))
    return {worker for worker, _ in answers}, {generation for _, generation in answers}


def master():
    return int((PLACE / "nginx.pid").read_text())


def children():
    text = Path(f"/proc/{master()}/task/{master()}/children").read_text()
    return {int(word) for word in text.split()}


def wait_for(truth, what):
    deadline = time.monotonic() + PATIENCE
    while not truth():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def listens():
    try:
        get("/status")
    except ConnectionRefusedError:
        return False
    return True


def make():
    (PLACE / "www").mkdir()
    for number in range(FILES):
        (PLACE / "www" / f"{number}.bin").write_bytes(content(number))


def note():
    wait_for(listens, "nginx does not listen")
    fetch_all()
    NOTED.write_text(" ".join(map(str, counters())))


def check():
    accepted, requests = map(int, NOTED.read_text().split())
    assert counters() == (accepted + 1, requests + 1), "the shared counters are not as they were"
    old = children()
    assert len(old) == WORKERS, f"{len(old)} workers"
    assert fetch_all() == (old, {1}), "not all workers serve"
    assert counters() == (accepted + REQUESTS + 2, requests + REQUESTS + 2), "requests uncounted"
    reload(old)
    reopen()


def reload(old):
    """The master reads a changed configuration, and starts new workers in place of the old."""
    text = CONFIGURATION.read_text()
    CONFIGURATION.write_text(re.sub(r"X-Generation 1", "X-Generation 2", text))
    nginx("reload")
    wait_for(lambda: not children() & old, "the old workers do not leave")
    wait_for(lambda: len(children()) == WORKERS, "there are no new workers")
    assert fetch_all() == (children(), {2}), "the new workers do not serve"


def reopen():
    """Master and workers open their log files anew."""
    log = PLACE / "access.log"
    log.rename(PLACE / "access.old")
    nginx("reopen")
    wait_for(log.exists, "there is no new access log")
    wait_for(lambda: fetch_all() and log.stat().st_size, "nothing is logged")


def nginx(signal):
    subprocess.run(["nginx", "-c", CONFIGURATION, "-s", signal], check=True)


if __name__ == "__main__":
    {"make": make, "note": note, "check": check}[sys.argv[1]]()
