"""A pool for certain images: as large as it must be, and where page tables are moved whole."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ovr import lab
from ovr.lab import demo
from ovr.lab.share import SHARE
from ovr.plan.pool.layout import TABLE_SPAN, UNIT
from tests.stress.guest import TROUBLE
from tests.vm.conftest import PREFIX, end_workload

SIZE = TABLE_SPAN + (160 << 20)
UMASK = 0o137


@dataclass(frozen=True)
class Guest:
    """A VM, and images of a process whose memory is larger than what a page table maps."""

    vm: lab.LabVm
    images: Path
    pid: int

    def ovr(self, command: str, *options: str | Path) -> Any:
        """Run a command of ours on the VM, and return what it says in JSON."""
        words = [command, "--vm", f"lab:{self.vm.name}", "--json", *options]
        done = subprocess.run(
            [sys.executable, "-m", "ovr", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def booted(tmp_path_factory) -> Iterator[Guest]:
    share = tmp_path_factory.mktemp("warm-for")
    with demo.lab_vm(f"{PREFIX}warm-for", memory="3G", share=share) as vm:
        demo.prepare(vm)
        pid = demo.start_workload(vm, SIZE, UMASK)
        vm.sh(f"mkdir {SHARE}/images")
        demo.dump_workload(vm, pid, f"{SHARE}/images")
        yield Guest(vm, share / "images", pid)


@pytest.fixture
def guest(booted: Guest) -> Iterator[Guest]:
    end_workload(booted.vm)
    yield booted
    end_workload(booted.vm)
    booted.ovr("warm", "--off")


def area_of(guest: Guest) -> tuple[int, int]:
    lines = guest.vm.sh(f"cat /proc/{guest.pid}/maps").stdout.decode().splitlines()
    spans = [[int(word, 16) for word in line.split()[0].split("-")] for line in lines]
    start, end = max(spans, key=lambda span: span[1] - span[0])
    return start, end


def test_a_pool_for_images(guest):
    made = guest.ovr("warm", "-D", guest.images)
    with guest.vm.connect() as agent:
        pool = agent.pool()
    assert made["size"] == pool.size
    assert SIZE <= pool.size <= SIZE + 2 * UNIT
    report = guest.ovr("restore", "-D", guest.images, "--verify", "full")
    assert (report["skeleton"], report["pid"]) == ("warm", guest.pid)
    assert report["bytes_warm"] > SIZE - 2 * UNIT
    start, end = area_of(guest)
    assert end - start >= SIZE
    # So the kernel moves what a page table maps at once, for what of it lies within the area.
    assert (pool.address - start // UNIT * UNIT) % TABLE_SPAN == 0
    answer = demo.answer_of(guest.vm, guest.pid)
    assert (answer.words, answer.wrong) == (SIZE // 8, 0)
    assert not guest.vm.sh(f"dmesg | grep -E '{TROUBLE}'").stdout


def test_a_larger_pool_will_do(guest):
    """An area is put where it is right in a pool that has room for that."""
    guest.ovr("warm", "--size", str(SIZE + TABLE_SPAN))
    report = guest.ovr("restore", "-D", guest.images, "--verify", "full")
    assert report["skeleton"] == "warm"
    assert report["bytes_warm"] > SIZE - 2 * UNIT
    answer = demo.answer_of(guest.vm, guest.pid)
    assert (answer.words, answer.wrong) == (SIZE // 8, 0)
    left = guest.vm.sh("grep -E 'AnonPages' /proc/meminfo | tr -dc 0-9").stdout
    assert int(left) << 10 < SIZE + (256 << 20)  # what was not needed of it is free again
