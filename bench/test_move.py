"""A process that runs and writes, moved between two VMs: by CRIU inside them, by ovr from outside.

It writes to 50 MiB of its memory a second, page by page, and tells its longest pause by its own
clocks. CRIU gets the best that it can do with a directory that both VMs and the host have in
memory: two pre-dumps while the process runs, a dump, and a restore. Each heat moves it to the
other VM.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ovr
from bench.conftest import PREFIX, SMOKE
from bench.guest import PATIENCE, UMASK, Guest
from bench.race import Heats, Lane, Measures, race, ratios, values
from ovr import lab
from ovr.lab import demo
from ovr.lab.demo_move import clock_of, pause_of, set_clock
from ovr.lab.share import SHARE
from ovr.move import MoveReport

INSIDE, OUTSIDE = "move.inside", "move.outside"
RATE = 50
SETTLED = 0.5  # seconds
STATES = ("idle",) if SMOKE else ("idle", "loaded")
BOTH = "--track-mem -v0"


class Moves:
    """A process, and the VM that it is in; the other one is where it goes next."""

    def __init__(self, vms: list[lab.LabVm], share: Path, size: int) -> None:
        self._vms = vms
        self._share = share
        self._size = size
        for vm in vms:
            demo.prepare(vm)
            set_clock(vm)
            # Its first run after the boot takes longer: what a move does while its pool is filled.
            self._sh(vm, "criu check || true")
        self.pid = demo.start_workload(vms[0], size, UMASK, RATE)

    def inside(self) -> Measures:
        """By the CRIUs of the guests alone."""

        def move(source: lab.LabVm, destination: lab.LabVm) -> None:
            previous = ""
            for number in (1, 2):
                directory = f"{SHARE}/{number}"
                self._sh(source, f"mkdir {directory} && criu pre-dump -t {self.pid} -D {directory}"
                                 f" {BOTH} {previous}")  # fmt: skip
                previous = f"--prev-images-dir ../{number}"
            self._sh(source, f"mkdir {SHARE}/3 && criu dump -t {self.pid} -D {SHARE}/3 {BOTH}"
                             f" {previous}")  # fmt: skip
            self._sh(destination, f"criu restore -d -D {SHARE}/3 -v0")

        try:
            return self._moved(move)
        finally:
            for left in self._share.iterdir():
                shutil.rmtree(left)

    def outside(self) -> Measures:
        """From outside."""
        reports: list[MoveReport] = []

        def move(source: lab.LabVm, destination: lab.LabVm) -> None:
            with (
                ovr.attach(f"lab:{source.name}") as here,
                ovr.attach(f"lab:{destination.name}") as there,
            ):
                reports.append(here.move(self.pid, there))

        found = self._moved(move)
        [report] = reports
        assert report.skeleton == "warm", report.skeleton_why
        return {
            **found, "told": report.downtime, "copied": report.bytes_copied / report.bytes_total
        }  # fmt: skip

    def _moved(self, move) -> Measures:
        source, destination = self._vms
        time.sleep(SETTLED)
        start = time.perf_counter()
        move(source, destination)
        seconds = time.perf_counter() - start
        time.sleep(SETTLED)
        answer = demo.answer_of(destination, self.pid)
        assert (answer.words, answer.wrong) == (self._size // 8, 0)
        down, error = pause_of(answer, clock_of(source), clock_of(destination))
        self._vms.reverse()
        return {"seconds": seconds, "down": down, "error": error}

    @staticmethod
    def _sh(vm: lab.LabVm, command: str) -> None:
        done = vm.sh(command, timeout=PATIENCE)
        assert done.status == 0, f"{command}: {done.stderr.decode(errors='replace')}"


@pytest.fixture(scope="module")
def vms(size) -> Iterator[tuple[list[lab.LabVm], Path]]:
    share = Path(tempfile.mkdtemp(prefix="ovr-bench-", dir="/dev/shm"))
    memory = f"{(size * 5 // 4 >> 20) + 768}M"
    made = []
    try:
        for name in ("from", "to"):
            made.append(lab.up(f"{PREFIX}{name}", memory=memory, share=share))
        yield made, share
    finally:
        for vm in made:
            vm.down()
        shutil.rmtree(share)


@pytest.fixture(scope="module")
def heats(vms, size, rounds, results) -> dict[str, Heats]:
    made, share = vms
    guests = [Guest(vm, share) for vm in made]
    moves = Moves(list(made), share, size)
    lanes = [Lane(INSIDE, moves.inside), Lane(OUTSIDE, moves.outside)]
    found: dict[str, Heats] = {"idle": race(lanes, rounds)}
    if "loaded" in STATES:
        with guests[0].loaded(), guests[1].loaded():
            found["loaded"] = race(lanes, rounds)
    for state, by_lane in found.items():
        results.put_race(state, by_lane, {"copied": "times"})
    return found


@pytest.mark.parametrize("state", STATES)
def test_times_less_downtime(heats, results, state):
    """Ratios of one run: how many times longer the process stands still with CRIU alone."""
    inside = values(heats[state], INSIDE, "down")
    outside = values(heats[state], OUTSIDE, "down")
    results.put(f"{OUTSIDE}.{state}.times_less_down", ratios(inside, outside), "times")
    print(f"\n{state}: down for {outside} s; CRIU alone {inside} s")
