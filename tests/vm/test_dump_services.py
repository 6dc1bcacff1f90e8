"""Real software, dumped from outside: CRIU alone and `ovr` restore it, it answers and goes on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import ovr
from ovr import lab
from ovr.dump import DumpReport
from ovr.lab import demo
from ovr.lab.share import SHARE
from tests.vm.conftest import EVERYTHING, PREFIX
from tests.vm.dumping import dump_outside
from tests.vm.services import HARDWARE, PACKAGES, SERVICES, Service, pack, restore_plain, unpack
from tests.vm.test_pool import TROUBLE

pytestmark = [
    pytest.mark.skipif(not EVERYTHING, reason="only with OVR_ALL=1"),
    pytest.mark.timeout(3600),  # all of them are started before the first test
]


@dataclass
class Journey:
    """What VM A left of its services, and a fresh VM B."""

    vm: lab.LabVm
    images: Path
    reports: dict[str, DumpReport] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)


@pytest.fixture(scope="module", params=sorted(PACKAGES))
def journey(request, tmp_path_factory) -> Iterator[Journey]:
    suite = request.param
    share = tmp_path_factory.mktemp(f"dump-services-{suite}")
    hardware = {**HARDWARE, "suite": suite, "packages": PACKAGES[suite]}
    with demo.lab_vm(f"{PREFIX}dump-services-a", **hardware) as vm:
        journey = Journey(vm, share)
        for service in SERVICES.values():
            depart(vm, service, journey)
    with demo.lab_vm(f"{PREFIX}dump-services-b", share=share, **hardware) as vm:
        journey.vm = vm
        yield journey


def depart(vm: lab.LabVm, service: Service, journey: Journey) -> None:
    """Dump a service. After a failure the next has its turn."""
    name = service.name
    try:
        service.prepare(vm)
        pid = service.start(vm)
        journey.reports[name] = dump_outside(vm, pid, journey.images / name, service.dump_options)
        pack(vm, service, journey.images / f"{name}.tar")
    except (ovr.OvrError, AssertionError) as error:
        journey.failed[name] = error
        service.end(vm)


@pytest.fixture(params=SERVICES)
def service(request, journey) -> Iterator[Service]:
    one = SERVICES[request.param]
    if one.name in journey.failed:
        raise journey.failed[one.name]
    one.prepare(journey.vm)
    unpack(journey.vm, one, journey.images / f"{one.name}.tar")
    yield one
    one.end(journey.vm)


def test_memory_is_read_outside(journey, service):
    report = journey.reports[service.name]
    assert report.bytes_outside / report.bytes_total >= 0.99


def test_goes_on_by_criu_alone(journey, service):
    restore_plain(journey.vm, service, f"{SHARE}/{service.name}")
    goes_on(journey, service)


def test_goes_on_from_outside(journey, service):
    with ovr.attach(f"lab:{journey.vm.name}") as attached:
        attached.restore(
            journey.images / service.name, criu_options=service.restore_options, verify="full"
        )
    goes_on(journey, service)


def goes_on(journey: Journey, service: Service) -> None:
    service.check(journey.vm)
    log = journey.vm.sh(f"dmesg | grep -E '{TROUBLE}'").stdout.decode(errors="replace")
    assert not log
