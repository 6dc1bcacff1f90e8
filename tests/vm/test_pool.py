"""The pool from outside: dumped in one VM, restored into a fresh one, checked from within.

And what nobody may be able to tell: the memory looks as after CRIU alone, and the guest is after
many restores what it was before.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import ovr
from ovr import lab
from ovr.attempt import settings
from ovr.errors import AttemptFailed
from ovr.guest.client.agent import Agent
from ovr.guest.client.results import Restored
from ovr.images import ImageSet
from ovr.lab import demo
from ovr.lab.share import SHARE
from ovr.plan import Plan, make_plan
from ovr.plan.pages import Reason
from tests.stress.guest import TROUBLE
from tests.support_matrix import record_memory
from tests.vm import pool
from tests.vm.conftest import EVERYTHING, ONLY_ALL, PREFIX, SUITES
from tests.vm.smaps import Area, as_areas, differences, memory_of, resident, showing

ROUNDS = int(os.environ.get("OVR_ROUNDS", "50" if EVERYTHING else "2"))
# Each kind of memory once, on forky that for which newer kernels or CRIUs differ. `pidns` is `tree`
# and `userns` is `shared`, each in namespaces of its own. test_kernels.py has `threads`.
CHOSEN = {
    "trixie": {"cow", "pidns", "smallvmas", "stacks", "memfd", "sysv", "hugetlb", "userns"},
    "forky": {"private", "special"},
}
# Of those, whose smaps differ from those of the others.
LOOKED_AT = {"private", "special", "cow", "smallvmas", "stacks", "memfd", "userns"}
# What leaves most behind if something goes wrong: namespaces, processes, shared memory.
LEAVING = {"userns"}
NAMESPACES = "ls -l /proc/[0-9]*/ns/* 2>/dev/null | sed 's/.*-> //' | sort -u"
THP = "/sys/kernel/mm/transparent_hugepage/enabled"
# Why pages may stay inside, or be nobody's.
EXCUSED = {Reason.VDSO, Reason.COW, Reason.INHERITED}
SHARED_EXCUSED = {Reason.SEALED, Reason.UNREACHABLE}


@dataclass(frozen=True)
class Journey:
    """A fresh VM, and the host's side of the images that came from another."""

    vm: lab.LabVm
    images: Path

    def restore(self, program: pool.Program, *options: str) -> ovr.Report:
        with ovr.attach(f"lab:{self.vm.name}") as attached:
            return attached.restore(
                self.images / program.name,
                criu_options=(*program.restore_options, *options),
                verify="full",
            )

    def trouble(self) -> str:
        return self.vm.sh(f"dmesg | grep -E '{TROUBLE}'").stdout.decode(errors="replace")


def programs_of(suite: str) -> list[pool.Program]:
    chosen = {*pool.BY_NAME} if EVERYTHING else CHOSEN[suite]
    return [one for one in pool.POOL if one.name in chosen and suite not in one.unsupported]


@pytest.fixture(scope="module", params=SUITES if EVERYTHING else CHOSEN)
def journey(request, tmp_path_factory) -> Iterator[Journey]:
    suite = request.param
    share = tmp_path_factory.mktemp(f"pool-{suite}")
    with demo.lab_vm(f"{PREFIX}pool-a", suite=suite, memory="1G", share=share) as vm:
        for program in programs_of(suite):
            pool.install(vm, program)
            pid = pool.start(vm, program)
            (share / program.name).mkdir()
            pool.dump(vm, program, pid, f"{SHARE}/{program.name}")
    with demo.lab_vm(f"{PREFIX}pool-b", suite=suite, memory="1G", share=share) as vm:
        yield Journey(vm, share)


@pytest.fixture(params=pool.BY_NAME)
def program(request, journey) -> Iterator[pool.Program]:
    one = pool.BY_NAME[request.param]
    if one not in programs_of(journey.vm.suite):
        pytest.skip(one.unsupported.get(journey.vm.suite, ONLY_ALL))
    pool.install(journey.vm, one)
    yield one
    pool.end(journey.vm, one)


def test_comes_back(journey, program):
    with ImageSet.open(journey.images / program.name) as images, journey.vm.connect() as agent:
        plan = make_plan(images, force_write=agent.hello.force_write)
        enough(program, make_plan(images))  # Linux 7.2 lets nobody force a write unless told to
        record(journey.vm, program.name, plan)
        tasks, outside = len(plan.tasks), plan.bytes_outside
    report = journey.restore(program)
    assert (report.tasks, report.bytes_outside) == (tasks, outside)
    for _ in range(2):
        answer = pool.ask(journey.vm, program)
        assert answer["ok"], answer["wrong"]
        assert answer["checks"] > 0
    assert not journey.trouble()


def enough(program: pool.Program, plan: Plan) -> None:
    """As much goes outside as is asked for, and nothing stays inside without a good reason."""
    private = sum(task.bytes_total for task in plan.tasks) - plan.bytes_cow
    outside = sum(task.bytes_outside for task in plan.tasks)
    assert outside / private >= (0.95 if program.tree else 0.99), plan.bytes_outside
    for task in plan.tasks:
        found = {reason for reason in task.by_reason() if reason != Reason.OUTSIDE}
        assert found <= EXCUSED | {Reason.SPECIAL}
    for shared in plan.shared:
        [reason] = shared.by_reason()
        assert reason == Reason.OUTSIDE or reason in SHARED_EXCUSED
    assert bool(plan.shared) >= program.shared


def record(vm: lab.LabVm, name: str, plan: Plan) -> None:
    """With OVR_RECORD set, note where the memory goes."""
    if not os.environ.get("OVR_RECORD"):
        return
    bytes_by: dict[str, int] = {}
    for memory in plan.memories:
        for reason, count in memory.by_reason().items():
            bytes_by[reason.name.lower()] = bytes_by.get(reason.name.lower(), 0) + count
    record_memory(vm.suite, name, len(plan.tasks), bytes_by)


@pytest.fixture
def small_pages(journey) -> Iterator[None]:
    """No transparent huge pages, which come as a fault happens to find the surroundings."""
    before = journey.vm.sh(f"grep -o '\\[.*\\]' {THP} | tr -d '[]'").stdout.decode().strip()
    journey.vm.sh(f"echo never > {THP}")
    yield
    journey.vm.sh(f"echo {before} > {THP}")


def test_memory_looks_as_after_criu_alone(journey, program, small_pages, monkeypatch):
    """VMA flags, protections, advice, and every figure of smaps, shared and private ones, too.

    Both are looked at while CRIU holds the tree: once it has let go, threads work on, if only until
    a stop reaches them.
    """
    if not EVERYTHING and program.name not in LOOKED_AT:
        pytest.skip(ONLY_ALL)
    wanted = made_by_criu(journey, program)
    pool.end(journey.vm, program)
    found, images = {}, []
    go = Agent.go

    def look_and_go(link: Agent) -> Restored:
        with link.keep_alive():  # else the agent kills a tree of which nobody speaks
            found.update(memory_of(journey.vm, pool.processes(journey.vm, program)))
            images.extend(images_in(journey.vm))
        return go(link)

    monkeypatch.setattr(Agent, "go", look_and_go)
    journey.restore(program)
    assert images
    assert not any(readable for _, readable in images)
    assert len(found) == len(wanted) > 0
    assert abs(resident(found) - resident(wanted)) <= 0.05 * resident(wanted)
    assert differences(wanted, found) == []


def images_in(vm: lab.LabVm) -> list[tuple[str, bool]]:
    """Return the images that the agent has, and whether an unprivileged user can read each."""
    other = f"setpriv --reuid={pool.MAPPED} --regid={pool.MAPPED} --clear-groups"
    each = 'for i; do true < "$i" && echo "$i" yes || echo "$i" no; done 2>/dev/null'
    script = f"{other} sh -c '{each}' sh $(find /run/ovr -type f -path '*/images/*')"
    lines = vm.sh(script).stdout.decode().splitlines()
    return [(name, answer == "yes") for name, answer in map(str.split, lines)]


@pytest.mark.parametrize("name", ["userns", "nested"])
def test_an_aborted_one_leaves_nothing(journey, name, monkeypatch):
    """Not CRIU's helpers either, of which it has one for a user namespace; no namespace is left."""
    program = pool.BY_NAME[name]
    if program not in programs_of(journey.vm.suite):
        pytest.skip(program.unsupported.get(journey.vm.suite, ONLY_ALL))
    pool.install(journey.vm, program)
    before = journey.vm.sh(NAMESPACES).stdout

    def fail(*_: object) -> None:
        assert pool.processes(journey.vm, program)
        raise AttemptFailed("as if it were wrong")

    monkeypatch.setattr(settings, "verify", fail)
    with pytest.raises(AttemptFailed, match="as if it were wrong"):
        journey.restore(program)
    assert not pool.processes(journey.vm, program)
    assert journey.vm.sh("pgrep -x criu; ls /run/ovr").stdout == b"lock\n"
    assert journey.vm.sh(NAMESPACES).stdout == before


def made_by_criu(journey: Journey, program: pool.Program) -> dict[int, list[Area]]:
    """Restore by CRIU alone; return the memory as it was before CRIU let go."""
    look, seen = "/var/tmp/pool-look", "/var/tmp/pool-seen"
    show = showing(f"$(pgrep -x pool-{program.name})")
    script = f"#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = pre-resume ] || exit 0\n{show} > {seen}\n"
    journey.vm.sh(f"cat > {look} && chmod +x {look}", input=script.encode())
    options = (*program.restore_options, "--action-script", look)
    pool.restore_plain(
        journey.vm, replace(program, restore_options=options), f"{SHARE}/{program.name}"
    )
    found = as_areas(journey.vm.sh(f"cat {seen}").stdout.decode())
    return {pid: areas for pid, areas in found.items() if areas}  # zombies have none


def test_many_in_a_row(journey):
    """Nothing is left in the guest, and its kernel has nothing to say; `make soak` does more."""
    if journey.vm.suite != "trixie" and not EVERYTHING:
        pytest.skip(ONLY_ALL)
    chance = random.Random(4)
    there = [one for one in programs_of(journey.vm.suite) if EVERYTHING or one.name in LEAVING]
    programs = [chance.choice(there) for _ in range(ROUNDS)]
    for one in {one.name: one for one in programs}.values():
        pool.install(journey.vm, one)
        there_and_gone(journey, one)
    before = leftovers(journey.vm)
    for one in programs:
        there_and_gone(journey, one)
    after = leftovers(journey.vm)
    assert not journey.trouble()
    memory = after.pop("MemAvailable") - before["MemAvailable"]
    for _ in range(10):  # the kernel frees some of it when it comes to it
        if memory > -(16 << 10):
            break
        memory = leftovers(journey.vm)["MemAvailable"] - before["MemAvailable"]
    assert memory > -(16 << 10), f"{-memory} KiB are gone after {ROUNDS} restores"
    del before["MemAvailable"]
    # The kernel counts open files in batches, one a CPU.
    assert abs(after.pop("files") - before.pop("files")) <= 1
    assert after == before


def there_and_gone(journey: Journey, program: pool.Program) -> None:
    journey.restore(program)
    answer = pool.ask(journey.vm, program)
    assert answer["ok"], (program.name, answer["wrong"])
    pool.end(journey.vm, program)


def leftovers(vm: lab.LabVm) -> dict[str, int]:
    """Return what could be left behind: memory in KiB, and numbers of other things."""
    counts = {
        "processes": "ls -d /proc/[0-9]* | wc -l",
        "mounts": "wc -l < /proc/mounts",
        "restores": "ls /run/ovr | wc -l",
        "cgroups": "find /sys/fs/cgroup -type d | wc -l",
        "namespaces": f"{NAMESPACES} | wc -l",
        "files": "cut -f1 /proc/sys/fs/file-nr",
        "MemAvailable": "grep MemAvailable /proc/meminfo | tr -dc 0-9",
    }
    vm.sh("sleep 2; sync; echo 3 > /proc/sys/vm/drop_caches; sleep 1")
    found = {name: int(vm.sh(command).stdout) for name, command in counts.items()}
    found["files"] //= 64  # the kernel counts them in batches
    found["processes"] //= 16  # its own workers come and go
    return found
