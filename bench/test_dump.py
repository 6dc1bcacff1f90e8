"""A running process with much memory, dumped by CRIU inside the VM and by ovr from outside.

It writes to 50 MB of its memory a second, and runs on after each dump. What is measured is how
long it did not run, as CRIU says in its ``stats-dump``, and how long the dump took; in turns, with
the VM idle and loaded. CRIU dumps to a tmpfs of the guest, `ovr` to one of the host.
"""

import shutil
import tempfile
import time
from pathlib import Path

import pytest

import ovr
from bench.race import Heats, Lane, Measures, race, ratios, values
from ovr.dump import AS_MANY_AS_HELP, dump
from ovr.images.stats import decode_dump_stats
from ovr.lab.workload import build_workload

INSIDE, OUTSIDE, PRE_COPIED = "dump.inside", "dump.outside", "dump.pre_copied"
RATE = 50_000_000
PROGRAM = "/usr/local/bin/bench-dirty"
IMAGES = "/images/dump"
READY = "/run/bench-dirty"


class Dumps:
    """A process that runs in the VM of the benchmarks, and its dumps."""

    def __init__(self, guest, size: int) -> None:
        self._guest = guest
        program = build_workload(Path(__file__).parent / "programs" / "dirty.c", "-std=gnu11")
        guest.vm.put(program, PROGRAM, 0o755)
        with guest.vm.connect() as agent:
            agent.spawn([PROGRAM, READY, str(size), str(RATE)])
        self.pid = int(guest.sh(f"until [ -s {READY} ]; do sleep 0.2; done; cat {READY}"))

    def end(self) -> None:
        self._guest.sh(f"kill -9 {self.pid}; rm -rf {READY} {IMAGES}")

    def inside(self) -> Measures:
        """By the guest's CRIU alone."""
        self._guest.sh(f"rm -rf {IMAGES}; mkdir -p {IMAGES}")
        start = time.perf_counter()
        self._guest.sh(f"cd {IMAGES} && criu dump -R -t {self.pid} -D {IMAGES} -o dump.log")
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as scratch:
            stats = Path(scratch) / "stats-dump"
            self._guest.vm.get(f"{IMAGES}/stats-dump", stats)
            frozen = decode_dump_stats(stats.read_bytes()).frozen_time / 1e6
        self._guest.sh(f"rm -rf {IMAGES}")
        return {"seconds": seconds, "frozen": frozen}

    def outside(self, *, pre_copies: int) -> Measures:
        """From outside."""
        images = Path(tempfile.mkdtemp(prefix="ovr-bench-", dir="/dev/shm"))
        try:
            start = time.perf_counter()
            with ovr.attach(f"lab:{self._guest.vm.name}") as vm:
                report = dump(
                    vm, self.pid, images, leave_running=True, pre_copies=pre_copies, verify="none"
                )
            seconds = time.perf_counter() - start
        finally:
            shutil.rmtree(images)
        assert report.bytes_outside > 0.999 * report.bytes_total
        return {"seconds": seconds, "frozen": report.frozen, "delta": self._delta(report)}

    @staticmethod
    def _delta(report) -> float:
        return float(report.bytes_total - report.bytes_pre_copied)


@pytest.fixture(scope="module")
def heats(guest, size, rounds, results):
    dumps = Dumps(guest, size)
    lanes = [
        Lane(INSIDE, dumps.inside),
        Lane(OUTSIDE, lambda: dumps.outside(pre_copies=0)),
        Lane(PRE_COPIED, lambda: dumps.outside(pre_copies=AS_MANY_AS_HELP)),
    ]
    found: dict[str, Heats] = {"idle": race(lanes, rounds)}
    with guest.loaded():
        found["loaded"] = race(lanes, rounds)
    dumps.end()
    for state, by_lane in found.items():
        results.put_race(state, by_lane, {"delta": "bytes"})
    return found


@pytest.mark.parametrize("state", ["idle", "loaded"])
@pytest.mark.parametrize("lane", [OUTSIDE, PRE_COPIED])
def test_times_less_frozen(heats, results, state, lane):
    """Ratios of one run: how many times longer the process stands still with CRIU alone."""
    inside = values(heats[state], INSIDE, "frozen")
    outside = values(heats[state], lane, "frozen")
    results.put(f"{lane}.{state}.times_less_frozen", ratios(inside, outside), "times")
    print(f"\n{lane} {state}: frozen {outside} s; CRIU alone {inside} s")
