"""Dumps of a process that changes its memory all the time, in a guest under stress."""

import random
import shutil
import sys
import time
from pathlib import Path

import ovr
from ovr import lab
from ovr.dump import DumpReport, dump
from ovr.errors import OvrError
from ovr.lab import demo
from tests.stress.guest import Noise, trouble
from tests.vm import churn

__all__ = ["dump_under_stress"]

CANARIES = 3
CANARY_MIB = 128
MEMORY = "1536M"
PAGES = 16384


def dump_under_stress(name: str, suite: str, scratch: Path, dumps: int) -> list[str]:
    """Dump it again and again, with another schedule each time; return what was wrong.

    Each dump is compared with all of the memory that the tree has while it is stopped; it runs on,
    and checks itself. Three of four dumps copy pages before they stop the tree, in up to three
    rounds.

    Args:
        name: of the VM.
        suite: of its guest.
        scratch: directory for the images.
        dumps: their number.
    """
    wrong = []
    with demo.lab_vm(name, suite=suite, memory=MEMORY, numa=2) as vm:
        churn.install(vm)
        noise = Noise(vm, CANARIES, CANARY_MIB)
        noise.start()
        for number in range(dumps):
            started = time.monotonic()
            verdict = "passed"
            try:
                report = _dump_once(vm, scratch / "images", number)
                verdict += f"  ({_kept(report):.0%} copied before)"
                noise.reclaim()
            except (OvrError, AssertionError) as error:
                wrong.append(str(error))
                verdict = f"FAILED  {error}"
            print(f"{number + 1:4}  {time.monotonic() - started:5.1f} s  {verdict}")
            sys.stdout.flush()
        if noise.canaries().wrong:
            wrong.append(f"{noise.canaries().wrong} pages of canaries are damaged")
    return wrong


def _dump_once(vm: lab.LabVm, images: Path, number: int) -> DumpReport:
    pid = churn.start(vm, seed=number)
    try:
        time.sleep(random.Random(number).uniform(0, 2))
        shutil.rmtree(images, ignore_errors=True)
        images.mkdir()
        with ovr.attach(f"lab:{vm.name}") as attached:
            report = dump(
                attached, pid, images, pre_copies=number % 4, leave_running=True, verify="full"
            )
        assert report.bytes_verified == report.bytes_total, report
        answer = churn.ask(vm, pid)
        assert (answer.pages, answer.wrong) == (PAGES, 0), answer
        said = trouble(vm)
        assert not said, f"the guest's kernel says: {said}"
        return report
    finally:
        churn.end(vm, pid)


def _kept(report: DumpReport) -> float:
    return report.bytes_pre_copied / report.bytes_total
