"""Restore many times into one VM from one process, and look for what is left each time.

``python -m tests.soak [--restores N] [--suite NAME]``
"""

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

import ovr
from ovr import lab
from ovr.errors import OvrError
from ovr.lab import demo
from ovr.lab.cache import cache_directory
from ovr.lab.image import SUITES
from tests import subject
from tests.subject import must

MIB = 1 << 20
SIZE = 4 * MIB
MEMORY = "512M"
WARM = 20
"""Restores before the first look: caches fill, allocators take what they keep."""
EQUAL = (
    "host: descriptors", "host: threads", "host: children", "host: temporary files",
    "guest: processes", "guest: criu", "guest: agents", "guest: held", "guest: restores",
    "guest: mounts", "guest: files in /run", "guest: descriptors of the agent",
)  # fmt: skip
GROWTH: Mapping[str, int] = {
    "host: KiB": 16 << 10,
    "guest: KiB of the agent": 256,
    "guest: KiB of slabs": 8 << 10,
    "guest: KiB used": 16 << 10,
}
"""By how much these may grow in all, however many restores there are: noise, and no more."""


@dataclass(frozen=True)
class Leak:
    """Something of which there is more than there was."""

    what: str
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.what}: {self.before} before, {self.after} after"


def measure(vm: lab.LabVm) -> dict[str, int]:
    """Return the resources of both sides, once the guest is idle."""
    must(vm, "sleep 1; sync; echo 3 > /proc/sys/vm/drop_caches")
    time.sleep(1)  # so that the agent has heard of that connection's end, too
    gc.collect()  # the view classes of an attached VM are cycles of objects
    ctypes.CDLL(None).malloc_trim(0)  # what is free is given back as it comes: 20 MiB more or less
    guest = subject.look(vm)
    guest["KiB used"] = -guest.pop("KiB available")  # of interest is by how much it grows
    us = psutil.Process()
    host = {
        "descriptors": us.num_fds(),
        "threads": threading.active_count(),
        "children": len(us.children(recursive=True)),
        "temporary files": len([*Path(tempfile.gettempdir()).iterdir()]),
        "KiB": us.memory_info().rss >> 10,
    }
    return {f"host: {name}": count for name, count in host.items()} | {
        f"guest: {name}": count for name, count in guest.items()
    }


def leaks(
    before: Mapping[str, int], after: Mapping[str, int], growth: Mapping[str, int] = GROWTH
) -> list[Leak]:
    """Return what has grown beyond its limit."""
    allowed = dict.fromkeys(EQUAL, 0) | growth
    return [
        Leak(what, before[what], after[what])
        for what, more in allowed.items()
        if after[what] > before[what] + more
    ]


def restore(vm: lab.LabVm, images: subject.Images, *, check: bool) -> None:
    """Restore, have the tree check itself if it is to, and end it."""
    with ovr.attach(f"lab:{vm.name}") as attached:
        attached.restore(images.path)
    if check:
        answer = subject.ask(vm)
        assert (answer.pages, answer.wrong) == (subject.pages(images.size), 0), answer
    subject.end(vm)


def soak(
    vm: lab.LabVm,
    images: subject.Images,
    restores: int,
    warm: int,
    growth: Mapping[str, int] = GROWTH,
) -> list[str]:
    """Restore so many times after the warm-up; returns what went wrong and what has leaked."""
    wrong = []
    before: dict[str, int] = {}
    started = time.monotonic()
    for number in range(warm + restores):
        if number == warm:
            before = measure(vm)
        try:
            restore(vm, images, check=number % 10 == 0)
        except (OvrError, AssertionError) as error:
            wrong.append(f"restore {number - warm + 1}: {error}")
            subject.end(vm)
        if number >= warm and (number - warm + 1) % 50 == 0:
            ours = psutil.Process().memory_info().rss >> 10
            took = time.monotonic() - started
            print(f"{number - warm + 1:5} restores in {took:.0f} s, {ours} KiB on the host")
            sys.stdout.flush()
    after = measure(vm)
    for what in dict.fromkeys([*EQUAL, *GROWTH]):
        print(f"{what:34} {before[what]:>9} before {after[what]:>9} after")
    return wrong + [str(leak) for leak in leaks(before, after, growth)]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--restores", type=int, default=100, help="after a warm-up of some more")
    parser.add_argument("--suite", choices=SUITES, default="trixie")
    return parser.parse_args(arguments)


def main() -> int:
    asked = parse()
    name = f"soak-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="ovr-soak-", dir=cache_directory()) as scratch:
        directory, tempfile.tempdir = Path(scratch, "images"), str(Path(scratch, "tmp"))
        for place in (directory, Path(tempfile.tempdir)):
            place.mkdir()
        images = subject.dump_in_a_vm(
            f"{name}-a", directory, SIZE, suite=asked.suite, memory=MEMORY
        )
        with demo.lab_vm(f"{name}-b", suite=asked.suite, memory=MEMORY) as vm:
            subject.install(vm)
            wrong = soak(vm, images, asked.restores, WARM)
    for line in wrong:
        print(line)
    failed = sum(line.startswith("restore ") for line in wrong)
    print(f"{asked.restores - failed} restores were right, {len(wrong) - failed} leaks")
    print(f"{asked.restores - failed} passed, {len(wrong)} failed")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
