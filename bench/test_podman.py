"""A redis container with much data: restored by podman in the VM, and by ovr from outside it.

Same guest, same archive, not packed, in the guest's page cache for podman; one after the other.
Both times end when podman says that the container runs.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import ovr
from bench.conftest import PREFIX, SMOKE
from ovr.lab import LabVm, demo
from ovr.lab.ram import memory_size
from tests.vm.containers import CACHE, PACKAGES, Container, load_image, make_image, podman, redis

SIZE = memory_size(os.environ.get("OVR_BENCH_SIZE", "8M" if SMOKE else "512M"))
MEMORY = os.environ.get("OVR_BENCH_MEMORY", "768M" if SMOKE else "3G")
CPUS = 1 if SMOKE else 2  # with two, TCG may not bear that the kernel patches itself
ROUNDS = 1 if SMOKE else int(os.environ.get("OVR_BENCH_ROUNDS", "3"))
ARCHIVE = "/var/tmp/cache.tar"


@dataclass(frozen=True)
class Bench:
    vm: LabVm
    container: Container
    archive: Path
    answer: str

    def clear(self) -> None:
        """Remove the container."""
        podman(self.vm, f"rm -f -i -v -t 0 {self.container.name}")

    def check(self) -> None:
        assert self.container.answer(self.vm) == self.answer


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    share = tmp_path_factory.mktemp("archive")
    container = replace(CACHE, packing="none", prepare=redis(SIZE))
    hardware = {"memory": MEMORY, "cpus": CPUS, "share": share, "packages": PACKAGES}
    with demo.lab_vm(f"{PREFIX}podman-a", **hardware) as source:
        make_image(source)
        container.start(source)
        answer = container.answer(source)
        container.checkpoint(source)
    with demo.lab_vm(f"{PREFIX}podman-b", **hardware) as target:
        load_image(target, "/mnt/share/image.tar")
        assert target.sh(f"cp /mnt/share/{container.archive} {ARCHIVE}", timeout=600).status == 0
        yield Bench(target, container, share / container.archive, answer)


@pytest.mark.benchmark(group="podman")
def test_podman_inside(bench, benchmark):
    """`podman container restore --import` in the guest."""

    def restore():
        done = bench.vm.sh(
            f"cat {ARCHIVE} >/dev/null; podman container restore --import {ARCHIVE}", timeout=900
        )
        assert done.status == 0, done.stderr

    benchmark.extra_info["bytes"] = bench.archive.stat().st_size
    benchmark.pedantic(restore, setup=bench.clear, rounds=ROUNDS, iterations=1)
    bench.check()


@pytest.mark.benchmark(group="podman")
def test_ovr_outside(bench, benchmark):
    """`ovr restore --archive` on the host, from attaching to podman's success."""
    reports = []

    def restore():
        with ovr.attach(f"lab:{bench.vm.name}") as vm:
            reports.append(vm.restore(archive=bench.archive, verify="none"))

    benchmark.pedantic(restore, setup=bench.clear, rounds=ROUNDS, iterations=1)
    bench.check()
    report = reports[-1]
    assert report.bytes_outside >= 0.95 * report.bytes_total
    benchmark.extra_info["bytes"] = report.bytes_total
    benchmark.extra_info["seconds"] = report.seconds
    benchmark.extra_info["held"] = report.held
    benchmark.extra_info["copy_gb_per_s"] = max(report.copy_gb_per_s for report in reports)
    bench.clear()
