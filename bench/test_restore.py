"""One process with much memory: restored by CRIU inside the VM, and by ovr from outside it.

Same guest, same images, warm page caches, an idle VM, one after the other. `bench/README.md`
says what can be set.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

import ovr
from bench.conftest import SMOKE
from ovr import demo
from ovr.lab import LabVm
from ovr.lab.ram import memory_size

SIZE = memory_size(os.environ.get("OVR_BENCH_SIZE", "64M" if SMOKE else "1G"))
MEMORY = os.environ.get("OVR_BENCH_MEMORY", "512M" if SMOKE else "4G")
ROUNDS = int(os.environ.get("OVR_BENCH_ROUNDS", "3"))
IMAGES_IN_GUEST = "/mnt/share"


@dataclass(frozen=True)
class Bench:
    vm: LabVm
    images: Path
    pid: int

    def clear(self) -> None:
        """End the process and wait until its memory is free again."""
        self.vm.sh("pkill -9 -x ovr-workload; while pgrep -x ovr-workload; do sleep 0.1; done")

    def check(self) -> None:
        answer = demo.answer_of(self.vm, self.pid)
        assert (answer.words, answer.wrong) == (SIZE // 8, 0)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    images = tmp_path_factory.mktemp("images")
    with demo.lab_vm("bench-a", memory=MEMORY, share=images) as source:
        pid = demo.start_workload(source, SIZE, 0o137)
        demo.dump_workload(source, pid)
    with demo.lab_vm("bench-b", memory=MEMORY, share=images) as target:
        demo.prepare(target)
        yield Bench(target, images, pid)


@pytest.mark.benchmark(group="restore")
def test_criu_inside(bench, benchmark):
    """`criu restore` in the guest, images in the guest's page cache."""

    def restore():
        with bench.vm.connect() as agent:
            command = ["criu", "restore", "-d", "-D", IMAGES_IN_GUEST, "-o", "/tmp/restore.log"]
            done = agent.run(command, timeout=600)
        assert done.status == 0, done.stderr

    bench.vm.sh(f"cat {IMAGES_IN_GUEST}/*.img > /dev/null", timeout=600)
    benchmark.extra_info["bytes"] = SIZE
    benchmark.pedantic(restore, setup=bench.clear, rounds=ROUNDS, warmup_rounds=1)
    bench.check()


@pytest.mark.benchmark(group="restore")
def test_ovr_outside(bench, benchmark):
    """`ovr restore` on the host, from attaching to the running process."""
    reports = []

    def restore():
        with ovr.attach(f"lab:{bench.vm.name}") as vm:
            reports.append(vm.restore(bench.images))

    benchmark.extra_info["bytes"] = SIZE
    benchmark.pedantic(restore, setup=bench.clear, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["seconds"] = reports[-1].seconds
    benchmark.extra_info["copy_gb_per_s"] = max(report.copy_gb_per_s for report in reports)
    bench.check()
