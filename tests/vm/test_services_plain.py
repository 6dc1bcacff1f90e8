"""CRIU alone takes every real service from one VM to another; without that ovr proves nothing.

Slow, and implied by the restores from outside: runs with OVR_SERVICES_PLAIN=1 only.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ovr import lab
from ovr.lab import demo
from ovr.lab.share import SHARE
from tests.vm.conftest import PREFIX
from tests.vm.services import (
    HARDWARE,
    PACKAGES,
    SERVICES,
    Service,
    dump,
    pack,
    restore_plain,
    unpack,
)

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("OVR_SERVICES_PLAIN"), reason="only with OVR_SERVICES_PLAIN=1"
    ),
    pytest.mark.timeout(1800),  # all five are started and dumped before the first test
]


@dataclass(frozen=True)
class Journey:
    """VM B, and where the host has what came from VM A."""

    vm: lab.LabVm
    shared: Path


@pytest.fixture(scope="module", params=sorted(PACKAGES))
def journey(request, tmp_path_factory) -> Iterator[Journey]:
    """All services dumped in VM A, which is gone; a fresh VM B."""
    suite = request.param
    shared = tmp_path_factory.mktemp(f"services-{suite}")
    hardware = {**HARDWARE, "suite": suite, "share": shared, "packages": PACKAGES[suite]}
    with demo.lab_vm(f"{PREFIX}services-a", **hardware) as vm:
        for service in SERVICES.values():
            depart(vm, service, shared)
    with demo.lab_vm(f"{PREFIX}services-b", **hardware) as vm:
        yield Journey(vm, shared)


def depart(vm: lab.LabVm, service: Service, shared: Path) -> None:
    """Dump a service. What goes wrong is noted, and the next service has its turn."""
    try:
        service.prepare(vm)
        pid = service.start(vm)
        dump(vm, service, pid, f"{SHARE}/{service.name}")
        pack(vm, service, shared / f"{service.name}.tar")
    except AssertionError as error:
        (shared / f"{service.name}.failed").write_text(str(error))
        service.end(vm)


@pytest.mark.parametrize("name", SERVICES)
def test_goes_on_in_another_vm(journey, name):
    service, vm = SERVICES[name], journey.vm
    failed = journey.shared / f"{name}.failed"
    assert not failed.exists(), failed.read_text()
    service.prepare(vm)
    unpack(vm, service, journey.shared / f"{name}.tar")
    restore_plain(vm, service, f"{SHARE}/{name}")
    try:
        service.check(vm)
    finally:
        service.end(vm)
