"""The warm skeleton: memory that was ready in the guest, and no trace of where it came from.

`programs/warm/large.c` is a family with areas of several huge pages, some of which a pool can give,
some not; it checks itself, and that no thread has another scheduling policy than before.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import ovr
from ovr import lab
from ovr.attempt.authentication import authenticate_alone
from ovr.guest.client.agent import Agent
from ovr.lab import demo
from ovr.lab.share import SHARE
from tests.documents import block, commands, run, said
from tests.stress.guest import TROUBLE
from tests.vm import pool
from tests.vm.conftest import EVERYTHING, PREFIX, SUITES
from tests.vm.smaps import Area, differences, memory_of

LARGE = pool.Program("large", 14, tree=True, source="../warm/large")
WITHIN = pool.within(LARGE, "user", "pid", "mount")
ENOUGH = 96 << 20


@dataclass(frozen=True)
class Guest:
    """A VM without the program, and the host's side of its images."""

    vm: lab.LabVm
    images: Path

    def warm(self, size: int) -> int:
        """Make a pool, or end it, and return how large it is."""
        with self.proved() as agent:
            return agent.warm(size).size

    @contextmanager
    def proved(self) -> Iterator[Agent]:
        """Whom the agent makes a pool for."""
        with ovr.attach(f"lab:{self.vm.name}") as vm, self.vm.connect() as agent:
            authenticate_alone(vm.kernel, agent, vm.qmp, vm.ram.slots)
            yield agent

    def pool(self) -> int:
        with self.vm.connect() as agent:
            return agent.pool().size

    def restore(self, *options: str, images: str = "images") -> ovr.Report:
        with ovr.attach(f"lab:{self.vm.name}") as vm:
            return vm.restore(self.images.parent / images, verify="full", criu_options=options)

    def answers(self) -> None:
        for _ in range(2):
            answer = pool.ask(self.vm, LARGE)
            assert answer["ok"], answer["wrong"]
            assert answer["checks"] > 0

    def out(self, command: str) -> str:
        return self.vm.sh(command).stdout.decode().strip()


@pytest.fixture(scope="module", params=SUITES if EVERYTHING else ("trixie",))
def booted(request, tmp_path_factory) -> Iterator[Guest]:
    share = tmp_path_factory.mktemp(f"warm-{request.param}")
    with demo.lab_vm(f"{PREFIX}warm-a", suite=request.param, memory="1G", share=share) as vm:
        for program, images in ((LARGE, "images"), (WITHIN, "within")):
            (share / images).mkdir()
            pool.install(vm, program)
            pool.dump(vm, program, pool.start(vm, program), f"{SHARE}/{images}")
    with demo.lab_vm(f"{PREFIX}warm-b", suite=request.param, memory="1G") as vm:
        pool.install(vm, LARGE)
        vm.sh("sync")  # what smaps calls dirty shall be the tasks' own
        yield Guest(vm, share / "images")


@pytest.fixture
def guest(booted) -> Iterator[Guest]:
    yield booted
    pool.end(booted.vm, LARGE)
    booted.warm(0)


def seen(guest: Guest) -> tuple[dict[int, list[Area]], dict[str, str]]:
    """Return the memory of the tree, and what else could tell where it came from."""
    pids = sorted(pool.processes(guest.vm, LARGE))
    memory = memory_of(guest.vm, pids)
    look = {
        "environment": "cat /proc/{}/environ | tr '\\0' ' '",
        "files": "ls -l /proc/{}/fd | sed 's/.* \\([0-9]* -> \\)/\\1/; s/:.*//' | tail -n +2",
        "cgroup": "cat /proc/{}/cgroup",
        "scores": "cat /proc/{}/oom_score_adj /proc/{}/timerslack_ns",
        "autogroup": "sed 's/.* nice/nice/' /proc/{}/autogroup",
        "threads": "cat /proc/{}/task/*/stat | awk '{{print $(NF-33), $(NF-12), $(NF-11)}}'",
        "limits": "cat /proc/{}/limits",
    }
    commands = {
        f"{name} of {pid}": line.format(pid, pid) for pid in pids for name, line in look.items()
    }
    script = "; ".join(f"echo '=={what}'; {line}" for what, line in commands.items())
    parts = (part.partition("\n") for part in guest.out(script).split("==")[1:])
    return memory, {what: text for what, _, text in parts}


def test_comes_back_warm_and_leaves_no_trace(guest):
    """The same as after a cold skeleton, which test_pool.py holds against CRIU alone."""
    guest.vm.sh("echo never > /sys/kernel/mm/transparent_hugepage/enabled")
    cold = guest.restore("--leave-stopped")
    assert (cold.skeleton, cold.skeleton_why) == ("cold", "the guest has no pool")
    areas = "cat /proc/$(pgrep -o pool-large)/maps | wc -l"
    memory, rest, count = *seen(guest), int(guest.out(areas))
    pool.end(guest.vm, LARGE)
    assert guest.warm(ENOUGH) == ENOUGH
    warm = guest.restore("--leave-stopped")
    assert (warm.skeleton, warm.skeleton_why) == ("warm", "")
    assert warm.bytes_warm > warm.bytes_outside // 2
    memory_now, rest_now = seen(guest)
    assert differences(memory, memory_now) == []
    assert rest_now == rest
    assert int(guest.out(areas)) <= count  # which pieces the kernel joins is partly chance
    assert guest.pool() == 0
    guest.vm.sh("echo always > /sys/kernel/mm/transparent_hugepage/enabled")


def test_works_on(guest):
    """In huge pages, as far as the pool had them, and every word right."""
    guest.vm.sh("sync; echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory")
    with guest.proved() as agent:
        made = agent.warm(ENOUGH)
    assert made.size == ENOUGH
    assert made.huge > 0
    report = guest.restore()
    assert report.skeleton == "warm"
    root = pool.root_pid(guest.vm, LARGE)
    huge = int(guest.out(f"grep AnonHugePages /proc/{root}/smaps_rollup | tr -dc 0-9")) << 10
    # At least those of the largest area; where the heap lies modulo 2 MiB is chance.
    assert huge >= (6 << 21) - (made.size - made.huge)
    guest.answers()
    assert not guest.out(f"dmesg | grep -E '{TROUBLE}'")


def test_in_a_user_namespace(guest):
    """CRIU looks into the images' parent from inside of it, too."""
    pool.install(guest.vm, WITHIN)
    guest.warm(ENOUGH)
    report = guest.restore(*WITHIN.restore_options, images="within")
    assert (report.skeleton, report.skeleton_why) == ("warm", "")
    assert report.bytes_warm > report.bytes_outside // 2
    guest.answers()


def test_too_small_a_pool_is_left_alone(guest):
    size = guest.warm(16 << 20)
    report = guest.restore()
    assert report.skeleton == "cold"
    assert report.skeleton_why.startswith("the pool has 16 MiB, and the tasks need ")
    assert guest.pool() == size
    guest.answers()


def test_a_pool_that_is_taken_away(guest):
    """By whoever kills it, as the OOM killer would, who takes it first."""
    guest.warm(ENOUGH)
    with guest.vm.connect() as agent:
        holder = agent.pool().pid
    assert guest.out(f"cat /proc/{holder}/oom_score_adj") == "1000"
    guest.vm.sh(f"kill -9 {holder}")
    with guest.vm.connect() as agent:
        while (left := agent.pool()).size:
            time.sleep(0.1)  # its end is still on its way to the agent
    assert (left.size, left.note) == (0, "it was killed; the guest needed the memory")


def test_the_documented_commands(guest, tmp_path):
    ours = {"libvirt:web": f"lab:{guest.vm.name}", "5G": "96M", "images/": str(guest.images)}
    printed = [
        run(line, tmp_path) for line in commands(said(block("docs/warm.md", "ovr warm"), ours))
    ]
    fitting, made, kept, asked, ended = printed
    assert " are ready, " in fitting
    assert made == kept == asked
    assert made.startswith("96.0 MiB are ready, ")
    assert ended.startswith("no pool: ")
    assert guest.pool() == 0


def test_a_failed_restore_costs_the_pool_and_nothing_else(guest):
    guest.warm(ENOUGH)
    guest.vm.sh(f"mv {LARGE.path} {LARGE.path}.away")
    with pytest.raises(ovr.OvrError) as caught:
        guest.restore()
    guest.vm.sh(f"mv {LARGE.path}.away {LARGE.path}")
    assert caught.value.exit_code == 1
    assert not pool.processes(guest.vm, LARGE)
    assert guest.pool() == 0
