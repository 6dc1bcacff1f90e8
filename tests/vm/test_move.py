"""Trees that are moved between two VMs and back, while they run."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import ovr
from ovr import lab
from ovr.attempt.attempt import Attempt
from ovr.errors import AgentUnreachable, AttemptFailed, CheckFailed, MoveInDoubt
from ovr.guest.client.agent import Agent
from ovr.lab import demo
from ovr.move import story
from ovr.move.commit import Commit
from ovr.move.decide import decide
from ovr.restore.release import let_run
from tests.stress.guest import TROUBLE
from tests.vm import pool
from tests.vm.conftest import EVERYTHING, ONLY_ALL, PREFIX, SUITES, alive

pytestmark = pytest.mark.timeout(3600)

CHOSEN = {"shared"}  # the tree of test_move_killed.py has threads, and memory shared by fork
SIZE = 96 << 20
UMASK = 0o137
RATE = 20  # MiB/s


@dataclass(frozen=True)
class Pair:
    """Two VMs."""

    one: lab.LabVm
    other: lab.LabVm

    @property
    def both(self) -> tuple[lab.LabVm, lab.LabVm]:
        return self.one, self.other


@pytest.fixture(scope="module", params=SUITES if EVERYTHING else SUITES[:1])
def pair(request) -> Iterator[Pair]:
    hardware = {"suite": request.param, "memory": "1G"}
    with (
        demo.lab_vm(f"{PREFIX}one", **hardware) as one,
        demo.lab_vm(f"{PREFIX}other", **hardware) as other,
    ):
        for vm in (one, other):
            demo.prepare(vm)
        yield Pair(one, other)
        for vm in (one, other):
            trouble = vm.sh(f"dmesg | grep -E '{TROUBLE}'").stdout.decode(errors="replace")
            assert not trouble
            assert vm.sh("find /sys/fs/cgroup -name 'ovr-move-*'").stdout == b""


def move(
    source: lab.LabVm, destination: lab.LabVm, tree: int | str, **options
) -> ovr.move.MoveReport:
    with ovr.attach(f"lab:{source.name}") as here, ovr.attach(f"lab:{destination.name}") as there:
        return here.move(tree, there, **{"verify": "full", **options})


@pytest.fixture(params=pool.BY_NAME)
def program(request, pair) -> Iterator[pool.Program]:
    one = pool.BY_NAME[request.param]
    if one.name not in CHOSEN and not EVERYTHING:
        pytest.skip(ONLY_ALL)
    if reason := one.unsupported.get(pair.one.suite):
        pytest.skip(reason)
    for vm in pair.both:
        pool.install(vm, one)
    yield one
    for vm in pair.both:
        pool.end(vm, one)


def test_there_and_back(pair, program):
    pool.start(pair.one, program)
    options = (*program.dump_options, *program.restore_options)
    for source, destination in (pair.both, pair.both[::-1]):
        pid = pool.root_pid(source, program)
        report = move(source, destination, pid, criu_options=options)
        assert report.bytes_verified >= report.bytes_outside
        assert not pool.processes(source, program)
        for _ in range(2):
            answer = pool.ask(destination, program)
            assert answer["ok"], answer["wrong"]
            assert answer["checks"] > 0


@pytest.fixture
def writer(pair) -> Iterator[int]:
    """The pid of a process of the first VM that writes all the time."""
    pid = demo.start_workload(pair.one, SIZE, UMASK, RATE)
    time.sleep(0.5)
    yield pid
    for vm in pair.both:
        if vm.alive:
            vm.sh("pkill -9 -x ovr-workload; while pgrep -x ovr-workload; do sleep 0.1; done")


def whole(vm: lab.LabVm, pid: int) -> int:
    """Return the number of pages that the writer has written, all of which are right."""
    answer = demo.answer_of(vm, pid)
    assert (answer.words, answer.wrong, int(answer.umask, 8)) == (SIZE // 8, 0, UMASK)
    return answer.written


def still_there(pair: Pair, pid: int) -> None:
    """Check that the writer goes on in the first VM, and that the second has nothing of it."""
    before = whole(pair.one, pid)
    assert whole(pair.one, pid) > before
    assert not alive(pair.other, pid)


def test_a_writer_loses_no_page(pair, writer):
    written = 0
    for source, destination in (pair.both, pair.both[::-1]) * 2:
        report = move(source, destination, writer)
        assert report.skeleton == "warm", report.skeleton_why
        assert report.bytes_ahead > report.bytes_outside / 2
        assert not alive(source, writer)
        now = whole(destination, writer)
        assert now > written
        written = now


@pytest.mark.parametrize("rounds", [1, 3])
def test_any_number_of_rounds(pair, writer, rounds):
    report = move(pair.one, pair.other, writer, rounds=rounds)
    assert len(report.rounds) == rounds + 1
    whole(pair.other, writer)


def test_a_pid_that_is_taken_is_told_before_anything_is_frozen(pair, writer):
    taken = f"echo {writer - 1} > /proc/sys/kernel/ns_last_pid; sleep 1000 & echo $!"
    assert int(pair.other.sh(taken).stdout) == writer
    try:
        with pytest.raises(CheckFailed) as caught:
            move(pair.one, pair.other, writer)
        assert caught.value.code == "preflight"
    finally:
        pair.other.sh(f"kill -9 {writer}; while test -d /proc/{writer}; do sleep 0.1; done")
    still_there(pair, writer)


@pytest.mark.parametrize(
    ("where", "step"), [(story, "look_at_stopped"), (story, "arrive"), (Commit, "run")]
)
def test_what_fails_before_go_leaves_it_where_it_is(pair, writer, where, step, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise AttemptFailed("something failed")

    monkeypatch.setattr(where, step, fail)
    with pytest.raises(AttemptFailed):
        move(pair.one, pair.other, writer)
    still_there(pair, writer)


def test_a_tree_that_turns_out_wrong_leaves_it_where_it_is(pair, writer, monkeypatch):
    real = story.arrive

    def spoil(attempt, stopped, images, *args, **options):
        arrived = real(attempt, stopped, images, *args, **options)
        attempt.vm.check_same_boot()
        raise AttemptFailed(f"{arrived.root_pid} is not to be")

    monkeypatch.setattr(story, "arrive", spoil)
    with pytest.raises(AttemptFailed):
        move(pair.one, pair.other, writer)
    still_there(pair, writer)


def in_doubt(pair: Pair, pid: int) -> str:
    """Check that the tree is frozen in the first VM; return the id of the move."""
    stat = f"cut -d ' ' -f 14,15 /proc/{pid}/stat"
    before = pair.one.sh(stat).stdout
    time.sleep(1.0)
    assert before and pair.one.sh(stat).stdout == before
    with ovr.attach(f"lab:{pair.one.name}") as vm, Attempt(vm) as attempt:
        [move_id] = attempt.agent.doubts()
    return move_id


def decided(pair: Pair, *, finish: bool, gone: bool = False) -> str:
    with (
        ovr.attach(f"lab:{pair.one.name}") as vm,
        ovr.attach(f"lab:{pair.other.name}") as there,
        Attempt(there) as other,
        Attempt(vm) as attempt,
    ):
        return decide(attempt, None if gone else other.agent, None, finish=finish)


def cut_off(monkeypatch, *, told: bool) -> None:
    """Cut the link to the destination at the commit, before or after it was told to go on."""

    def lose(agent: Agent, kernel, root_pid: int) -> None:
        if told:
            let_run(agent, kernel, root_pid)
        else:
            agent.close()
        raise AgentUnreachable("the link broke", "")

    monkeypatch.setattr(story, "let_run", lose)


def test_a_move_in_doubt_is_finished(pair, writer, monkeypatch):
    cut_off(monkeypatch, told=True)
    with pytest.raises(MoveInDoubt) as caught:
        move(pair.one, pair.other, writer)
    assert in_doubt(pair, writer) == caught.value.move
    before = whole(pair.other, writer)
    with pytest.raises(CheckFailed) as wrong:
        decided(pair, finish=False)
    assert wrong.value.code == "released"
    assert decided(pair, finish=True) == caught.value.move
    assert not alive(pair.one, writer)
    assert whole(pair.other, writer) > before


def test_a_move_in_doubt_is_taken_back(pair, writer, monkeypatch):
    cut_off(monkeypatch, told=False)
    with pytest.raises(MoveInDoubt) as caught:
        move(pair.one, pair.other, writer)
    assert in_doubt(pair, writer) == caught.value.move
    gone = f"for i in $(seq 100); do test -d /proc/{writer} || exit 0; sleep 0.1; done; exit 1"
    assert pair.other.sh(gone).status == 0
    with pytest.raises(CheckFailed) as wrong:
        decided(pair, finish=True)
    assert wrong.value.code == "not-released"
    assert decided(pair, finish=False) == caught.value.move
    still_there(pair, writer)


def test_a_move_to_a_vm_that_is_gone_is_taken_back(pair, writer, monkeypatch):
    cut_off(monkeypatch, told=False)
    with pytest.raises(MoveInDoubt):
        move(pair.one, pair.other, writer)
    decided(pair, finish=False, gone=True)
    still_there(pair, writer)
