"""Benchmarks run on a lab VM of their own. ``OVR_BENCH=smoke``: each once, times not judged."""

import os
from pathlib import Path

import pytest

from bench.guest import Guest, memory_for
from bench.results import COMMITTED, Results
from ovr import lab
from ovr.lab.ram import memory_size
from ovr.vm.attach import AttachedVm
from tests.tcg import Guests

PREFIX = f"bench-{os.getpid()}-"
SMOKE = os.environ.get("OVR_BENCH") == "smoke"


def pytest_addoption(parser):
    group = parser.getgroup("ovr")
    size, rounds = ("32M", 1) if SMOKE else ("1G", 5)
    group.addoption("--size", default=size, help="memory of the process (%(default)s)")
    group.addoption("--rounds", type=int, default=rounds, help="of each race (%(default)s)")
    group.addoption("--results", type=Path, default=COMMITTED, help="where the figures go")


def pytest_configure(config):
    config.pluginmanager.register(Guests(PREFIX))
    # Before pytest-benchmark reads its options, which skip benchmarks or everything else.
    config.option.benchmark_skip = config.option.benchmark_only = False
    if SMOKE:
        config.option.benchmark_disable = True


@pytest.fixture(scope="session")
def size(request):
    return memory_size(request.config.getoption("--size"))


@pytest.fixture(scope="session")
def rounds(request):
    return request.config.getoption("--rounds")


@pytest.fixture(scope="session")
def results(request, tmp_path_factory, size, rounds):
    """The figures; those of a smoke run are thrown away."""
    path = request.config.getoption("--results")
    if SMOKE and path == COMMITTED:
        path = tmp_path_factory.mktemp("results") / "results.json"
    kept = Results(path, size=size, rounds=rounds)
    yield kept
    kept.write()


@pytest.fixture(scope="session")
def share(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="session")
def vm(share, size, results):
    suite = os.environ.get("OVR_BENCH_SUITE", "trixie")
    made = lab.up(f"{PREFIX}main", suite=suite, memory=memory_for(size), share=share)
    results.describe(made)
    yield made
    made.down()


@pytest.fixture(scope="session")
def guest(vm, share):
    return Guest(vm, share)


@pytest.fixture(scope="module")
def attached(vm):
    """Holds the VM's QMP socket, which has room for one: not while `ovr` is to run."""
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
