"""Real software from the guest's distribution: restored from outside, it answers and goes on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ovr
from ovr import lab
from ovr.images import ImageSet
from ovr.lab import demo
from ovr.lab.share import SHARE
from ovr.plan import make_plan
from tests.vm.conftest import EVERYTHING, PREFIX
from tests.vm.services import HARDWARE, PACKAGES, SERVICES, dump, pack, packages, unpack
from tests.vm.test_pool import TROUBLE, record

pytestmark = pytest.mark.timeout(1800)  # all of them are started before the first test
# By default that with network sockets and workers that share memory. The containers of
# test_podman.py run redis, with threads; the others take minutes to start.
CHOSEN = tuple(SERVICES) if EVERYTHING else ("nginx",)


@dataclass(frozen=True)
class Journey:
    """A fresh VM, and what the host has from another one: images, and files to carry."""

    vm: lab.LabVm
    images: Path


@pytest.fixture(scope="module", params=sorted(PACKAGES) if EVERYTHING else ["trixie"])
def journey(request, tmp_path_factory) -> Iterator[Journey]:
    suite = request.param
    share = tmp_path_factory.mktemp(f"services-{suite}")
    hardware = {**HARDWARE, "suite": suite, "packages": packages(suite, CHOSEN)}
    with demo.lab_vm(f"{PREFIX}services-a", share=share, **hardware) as vm:
        for service in (SERVICES[name] for name in CHOSEN):
            service.prepare(vm)
            pid = service.start(vm)
            dump(vm, service, pid, f"{SHARE}/{service.name}")
            pack(vm, service, share / f"{service.name}.tar")
    with demo.lab_vm(f"{PREFIX}services-b", **hardware) as vm:
        yield Journey(vm, share)


@pytest.mark.parametrize("name", CHOSEN)
def test_goes_on_in_another_vm(journey, name):
    service, images = SERVICES[name], journey.images / name
    with ImageSet.open(images) as opened:
        plan = make_plan(opened)
        alone = plan.bytes_total - plan.bytes_cow
        share = plan.bytes_outside / alone
        record(journey.vm, name, plan)
        single = len(plan.tasks) == 1 and not plan.shared
    assert share >= (0.99 if single else 0.95)
    service.prepare(journey.vm)
    unpack(journey.vm, service, journey.images / f"{name}.tar")
    try:
        with ovr.attach(f"lab:{journey.vm.name}") as vm:
            vm.restore(images, criu_options=service.restore_options, verify="full")
        service.check(journey.vm)
    finally:
        service.end(journey.vm)
    log = journey.vm.sh(f"dmesg | grep -E '{TROUBLE}'").stdout.decode(errors="replace")
    assert not log
