"""Each fuzz target for seconds: on all that it begins with, and on inputs made of that by chance.

`make fuzz` is the real thing: guided by coverage, and with the extension built with sanitizers.
"""

import os
import random
import subprocess
import time

import pytest

from tests.fuzz.build import C_TARGETS, build_program
from tests.fuzz.corpus import seeds, unpack, write
from tests.fuzz.targets import TARGETS

SECONDS = 2.0
MOST = 300
SLOWEST = 60.0 if os.environ.get("OVR_SANITIZE") else 10.0
"""Seconds for one input, on a machine that does other things too."""


def damaged(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(changed))
        match chance.randint(0, 3):
            case 0:
                changed[at : at + 1] = chance.randbytes(1)
            case 1:
                del changed[at : at + chance.randint(1, 16)]
            case 2:
                changed[at : at + 8] = chance.choice([b"\xff" * 8, bytes(8), b"\x80" + bytes(7)])
            case _:
                changed[at:at] = changed[: chance.randint(0, 16)]
    return bytes(changed)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("name", TARGETS)
def test_in_python(name):
    target, chance = TARGETS[name], random.Random(name)
    given = seeds(name)
    inputs = [*chance.sample(given, min(len(given), MOST))]
    inputs += [damaged(chance.choice(given), chance) for _ in range(MOST)]
    until = time.monotonic() + SECONDS
    for number, data in enumerate(inputs):
        started = time.monotonic()
        target.run(data)
        assert time.monotonic() - started < SLOWEST, data
        if time.monotonic() > until and number > 10:
            break


@pytest.mark.parametrize("name", C_TARGETS)
def test_in_c(name, tmp_path):
    program = build_program(C_TARGETS[name], tmp_path, guided=False)
    write(tmp_path / "seeds", seeds(name))
    files = sorted(map(str, (tmp_path / "seeds").iterdir()))
    done = subprocess.run(
        [program, "2000", *files], env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*TARGETS, *C_TARGETS])
def test_there_is_a_corpus(name):
    assert unpack(name)
