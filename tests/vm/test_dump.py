"""Dumped from outside: CRIU alone restores it and so does `ovr`, and the images are CRIU's.

Every program of the pool, in two VMs; what a service needs is in `test_dump_services.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import ovr
from ovr import lab
from ovr.dump import DumpReport
from ovr.lab import demo
from ovr.lab.share import SHARE
from tests.stress.guest import TROUBLE
from tests.vm import pool
from tests.vm.conftest import EVERYTHING, ONLY_ALL, PREFIX, SUITES
from tests.vm.dumping import dump_outside, unlike_criu

pytestmark = pytest.mark.timeout(3600)  # all of them are dumped before the first test
PRE_COPIED = "-pre-copied"
WAYS = {"stopped": "", "pre-copied": PRE_COPIED}
CHOSEN = {"threads", "cow", "hugetlb"}
# Pre-copied: memory that is shared by fork, and written by all. Another one is stopped only.
HARDEST = "cow"
# The rest are sealed memfds, and System V segments that no task has attached.
LEAST = {"memfd": 0.9, "sysv": 0.8}


@dataclass
class Journey:
    """What VM A left of its programs, and a fresh VM B.

    Attributes:
        vm: VM B.
        images: a directory of the host with the images of each program.
        reports: of the dumps that ended the programs.
        pre_copied: of those before, which copied while they ran.
        unlike: how the images differ from CRIU's.
        failed: why there are none.
    """

    vm: lab.LabVm
    images: Path
    reports: dict[str, DumpReport] = field(default_factory=dict)
    pre_copied: dict[str, DumpReport] = field(default_factory=dict)
    unlike: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)

    def outcome(self, name: str) -> DumpReport:
        """Return the report of a dump.

        Raises:
            Exception: the dump's.
        """
        if name in self.failed:
            raise self.failed[name]
        return self.reports[name]

    def trouble(self) -> str:
        return self.vm.sh(f"dmesg | grep -E '{TROUBLE}'").stdout.decode(errors="replace")


def programs_of(suite: str) -> list[pool.Program]:
    return [
        one for one in pool.POOL
        if (EVERYTHING or one.name in CHOSEN) and suite not in one.unsupported
    ]  # fmt: skip


def is_chosen(name: str, way: str) -> bool:
    """Whether images that were made in this way are to be restored: by default those of one."""
    return EVERYTHING or bool(way) == (name == HARDEST)


def depart(vm: lab.LabVm, program: pool.Program, journey: Journey) -> None:
    """Dump a program where it stands still, and twice as it runs.

    After a failure the next has its turn.
    """
    name = program.name
    pool.install(vm, program)
    try:
        pid = pool.start(vm, program)
        images, options = journey.images / name, program.dump_options
        journey.unlike[name] = unlike_criu(
            vm, pid, pool.processes(vm, program), Path(f"{images}-still"), options
        )
        if is_chosen(name, PRE_COPIED):
            journey.pre_copied[name] = dump_outside(
                vm, pid, Path(f"{images}{PRE_COPIED}"), options, leave_running=True, pre_copies=2
            )
        journey.reports[name] = dump_outside(vm, pid, images, options)
        assert not pool.processes(vm, program)
    except (ovr.OvrError, AssertionError) as error:
        journey.failed[name] = error
        pool.end(vm, program)


@pytest.fixture(scope="module", params=SUITES if EVERYTHING else SUITES[:1])
def journey(request, tmp_path_factory) -> Iterator[Journey]:
    suite = request.param
    share = tmp_path_factory.mktemp(f"dump-{suite}")
    with demo.lab_vm(f"{PREFIX}dump-a", suite=suite, memory="1G") as vm:
        journey = Journey(vm, share)
        for program in programs_of(suite):
            depart(vm, program, journey)
        trouble = journey.trouble()
    assert not trouble
    with demo.lab_vm(f"{PREFIX}dump-b", suite=suite, memory="1G", share=share) as vm:
        journey.vm = vm
        yield journey


@pytest.fixture(params=pool.BY_NAME)
def program(request, journey) -> Iterator[pool.Program]:
    one = pool.BY_NAME[request.param]
    if one not in programs_of(journey.vm.suite):
        pytest.skip(one.unsupported.get(journey.vm.suite, ONLY_ALL))
    journey.outcome(one.name)
    yield one


@pytest.fixture
def arrival(program, way, journey) -> Iterator[pool.Program]:
    if not is_chosen(program.name, way):
        pytest.skip(ONLY_ALL)
    pool.install(journey.vm, program)
    yield program
    pool.end(journey.vm, program)


def test_images_are_as_by_criu(journey, program):
    assert journey.unlike[program.name] == []


def test_memory_is_read_outside(journey, program):
    report = journey.outcome(program.name)
    assert report.bytes_outside / report.bytes_total >= LEAST.get(program.name, 0.99)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_comes_back_by_criu_alone(journey, arrival, way):
    pool.restore_plain(journey.vm, arrival, f"{SHARE}/{arrival.name}{way}")
    whole(journey, arrival)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_comes_back_from_outside(journey, arrival, way):
    """Images of a stopped program are like CRIU's own, which test_pool.py restores."""
    if not (way or EVERYTHING):
        pytest.skip(ONLY_ALL)
    with ovr.attach(f"lab:{journey.vm.name}") as attached:
        attached.restore(
            journey.images / f"{arrival.name}{way}",
            criu_options=arrival.restore_options,
            verify="full",
        )
    whole(journey, arrival)


def whole(journey: Journey, program: pool.Program) -> None:
    for _ in range(2):
        answer = pool.ask(journey.vm, program)
        assert answer["ok"], answer["wrong"]
        assert answer["checks"] > 0
    assert not journey.trouble()
