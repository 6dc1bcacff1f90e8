"""Lab VMs, booted once a session and shared."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ovr import lab
from ovr.lab import demo
from tests.tcg import Guests

HERE = Path(__file__).parent
UMASK = 0o137
SIZE = 192 << 20
SUITES = ("trixie", "bookworm", "forky")
EVERYTHING = bool(os.environ.get("OVR_ALL"))
"""Whether to run each test on every suite and with every program: hours under TCG.

By default each behaviour is tested once, where it is hardest; see docs/stress.md.
"""
ONLY_ALL = "only with OVR_ALL=1"
LONGEST = (
    "test_quickstart", "test_pool", "test_move_podman", "test_podman_dump", "test_podman",
    "test_states", "test_under_fire", "test_chains", "test_services", "test_warm", "test_restore",
    "test_move_killed", "test_dump", "test_move", "test_view", "test_kernels", "test_dump_precopy",
)  # fmt: skip
"""Files that take a minute and more; the longest first."""

PREFIX = f"test-{os.getpid()}-"
FINDING = re.compile(r"ERROR: \w+Sanitizer|runtime error:")


def pytest_configure(config):
    config.pluginmanager.register(Guests(PREFIX))


def contained_in(test: str) -> pytest.MarkDecorator:
    """Mark a test whose behaviour is wholly another one's, which always runs."""
    return pytest.mark.skipif(not EVERYTHING, reason=f"{ONLY_ALL}: contained in {test}")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest: one that begins last has a worker for itself."""
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    for item in ours:
        item.add_marker("vm")
    places = {name: place for place, name in enumerate(LONGEST)}
    ours.sort(key=lambda item: places.get(item.path.stem, len(places)))
    items[:] = [item for item in items if not item.path.is_relative_to(HERE)] + ours


@pytest.fixture(autouse=True)
def no_finding(monkeypatch):
    """Where the agent is built with sanitizers, each test fails of which one has something to say.

    An agent that has ended so is started again by its guest's init, and not always missed.
    """
    found: list[str] = []
    before = {vm.name: len(findings(vm)) for vm in lab.ls()}
    down = lab.LabVm.down

    def look_and_end(vm):
        found.extend(findings(vm)[before.pop(vm.name, 0) :])
        down(vm)

    monkeypatch.setattr(lab.LabVm, "down", look_and_end)
    yield
    for vm in lab.ls():
        found.extend(findings(vm)[before.get(vm.name, 0) :])
    assert not found


def findings(vm) -> list[str]:
    if not (os.environ.get("OVR_SANITIZE") and vm.name.startswith(PREFIX) and vm.console.exists()):
        return []
    return [line for line in vm.console.read_text(errors="replace").splitlines()
            if FINDING.search(line)]  # fmt: skip


@dataclass(frozen=True)
class Dump:
    """Images on the host, and the pid that they are of."""

    path: Path
    pid: int
    size: int = SIZE
    umask: int = UMASK


class Pool:
    """VMs by what they are made of. Only as many at once as memory allows: oldest goes first."""

    LIMIT = 2

    def __init__(self) -> None:
        self._vms: dict[tuple, lab.LabVm] = {}
        self._count = 0

    def get(self, suite: str, memory: str = "1G", **hardware) -> lab.LabVm:
        key = (suite, memory, *sorted(hardware.items()))
        vm = self._vms.get(key)
        if vm is not None and vm.alive:
            return vm
        while len(self._vms) >= self.LIMIT:
            self._vms.pop(next(iter(self._vms))).down()
        self._count += 1
        vm = lab.up(f"{PREFIX}{self._count}", suite=suite, memory=memory, **hardware)
        demo.prepare(vm)
        self._vms[key] = vm
        return vm

    def close(self) -> None:
        for vm in self._vms.values():
            vm.down()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def dumps(tmp_path_factory) -> Iterator[dict[str, Dump]]:
    """A dump of the workload by each suite, made when first asked for."""

    class Dumps(dict):
        def __missing__(self, suite: str) -> Dump:
            path = tmp_path_factory.mktemp(f"images-{suite}")
            with demo.lab_vm(f"{PREFIX}a", suite=suite, memory="1G", share=path) as vm:
                pid = demo.start_workload(vm, SIZE, UMASK)
                demo.dump_workload(vm, pid)
            self[suite] = Dump(path, pid)
            return self[suite]

    yield Dumps()


@pytest.fixture(scope="module", params=SUITES if EVERYTHING else SUITES[:1])
def suite(request) -> str:
    """A suite. A module runs all tests of one before those of the next: `Pool` has few VMs."""
    return request.param


@pytest.fixture
def dump(suite, dumps) -> Dump:
    return dumps[suite]


@pytest.fixture
def vm(suite, pool) -> Iterator[lab.LabVm]:
    """A running VM of the suite, without anything of an earlier test."""
    vm = pool.get(suite)
    end_workload(vm)
    yield vm
    end_workload(vm)


def end_workload(vm: lab.LabVm) -> None:
    if vm.alive:
        names = "'ovr-workload|ovr-neutral'"  # the second is what CRIU alone makes of it
        vm.sh(f"pkill -9 -x {names}; while pgrep -x {names}; do sleep 0.1; done")


def whole(vm: lab.LabVm, dump: Dump) -> None:
    """The workload runs in the VM, and all of its memory and its umask are right."""
    answer = demo.answer_of(vm, dump.pid)
    assert (answer.words, answer.wrong, int(answer.umask, 8)) == (SIZE // 8, 0, UMASK)


def alive(vm: lab.LabVm, pid: int) -> bool:
    return vm.sh(f"test -d /proc/{pid}").status == 0
