"""Benchmarks run on a lab VM of their own. ``OVR_BENCH=smoke``: each once, times not judged."""

import os

import pytest

from ovr import lab
from ovr.vm.attach import AttachedVm

SMOKE = os.environ.get("OVR_BENCH") == "smoke"


def pytest_configure(config):
    if SMOKE:  # before pytest-benchmark looks at its options
        config.option.benchmark_skip = config.option.benchmark_only = False
        config.option.benchmark_disable = True


@pytest.fixture(scope="session")
def vm():
    suite = os.environ.get("OVR_BENCH_SUITE", "trixie")
    memory = os.environ.get("OVR_BENCH_MEMORY", "512M" if SMOKE else "1G")
    made = lab.up(f"bench-{os.getpid()}", suite=suite, memory=memory)
    yield made
    made.down()


@pytest.fixture(scope="session")
def attached(vm):
    with AttachedVm(f"lab:{vm.name}", writable=True) as attached:
        yield attached


@pytest.fixture(scope="session")
def judge():
    """Say that a time must be below a limit; the best of all rounds, so that noise is no fault."""

    def check(benchmark, seconds: float) -> None:
        benchmark.extra_info["limit_seconds"] = seconds
        if benchmark.stats is not None:
            assert benchmark.stats.stats.min <= seconds

    return check
