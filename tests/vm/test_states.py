"""Every kind of state: set to something unusual, restored from outside, asked for from within.

And the load-bearing twin: CRIU alone on the same inside images gives something else.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

import ovr
from ovr.images import CoreEntry, ImageSet, copy_of
from ovr.images.framing import encode, image_bytes
from ovr.state import KINDS
from tests.support_matrix import RECORD
from tests.vm import states_lab as states
from tests.vm.conftest import EVERYTHING, SUITES
from tests.vm.pool import MAPPED, ROOT

NAMES = [kind.name for kind in KINDS]
OF_THE_TREE = {"nodename", "domainname", "ipc_limits"}
ONE_BIT = {"child_subreaper", "dumpable"}  # of two processes one has the neutral value
AMBIENT = 1 << 5  # CAP_KILL


@dataclass(frozen=True)
class Experiment:
    """Answers of the processes before the dump, restored from outside, and restored neutral."""

    before: states.Answers
    after: states.Answers
    twin: states.Answers
    report: ovr.Report


EXPERIMENTS = [
    (suite, processes) for suite in reversed(SUITES) for processes in (1, 3)
    if EVERYTHING or processes > 1
]  # fmt: skip


@pytest.fixture(scope="session", params=EXPERIMENTS, ids=str)
def experiment(request, pool, tmp_path_factory) -> Experiment:
    suite, processes = request.param
    path = tmp_path_factory.mktemp(f"states-{suite}-{processes}") / "images"
    path.mkdir()
    vm = pool.get(suite)
    pids = states.start(vm, processes)
    before = states.ask(vm, pids)
    states.dump(vm, pids[0], path)
    complete(path, before)
    report = states.restore_outside(vm, path)
    after = states.ask(vm, pids)
    states.end(vm, pids)
    states.restore_neutral(vm, path, NAMES)
    twin = states.ask(vm, pids)
    states.end(vm, pids)
    found = Experiment(before, after, twin, report)
    record(vm, found)
    return found


def complete(path: Path, answers: states.Answers) -> None:
    """Add what CRIU 3.17 does not dump, as later ones do: no_new_privs and ambient capabilities."""
    with ImageSet.open(path) as images:
        tasks = images.tasks
    for task, answer in zip(tasks, answers, strict=True):
        # CRIU lists threads by tid, and their order is that in which they were made.
        for tid, thread in zip(sorted(task.threads), answer["threads"], strict=True):
            core: CoreEntry = copy_of(task.cores[tid])
            creds = core.thread_core.creds
            if thread["no_new_privs"]:
                creds.no_new_privs = 1
            if not creds.cap_amb:
                creds.cap_amb[:] = [AMBIENT, 0]
            assert list(creds.cap_amb) == [AMBIENT, 0]
            name = f"core-{tid}.img"
            (path / name).write_bytes(image_bytes(name, [encode(core)]))


def record(vm, found: Experiment) -> None:
    """With OVR_RECORD set, note which kinds came back and are load-bearing on this kernel."""
    if not os.environ.get("OVR_RECORD"):
        return
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    right = {name for name in NAMES if came_back(found, name) and load_bearing(found, name)}
    if len(found.before) > 1:  # the tree comes second: what is right is so in both
        right &= set(recorded.get(vm.suite, {}).get("kinds", ()))
    recorded[vm.suite] = recorded.get(vm.suite, {}) | {
        "kernel": vm.sh("uname -r").stdout.decode().strip(),
        "criu": vm.sh("criu --version").stdout.decode().split()[1],
        "kinds": sorted(right),
    }
    RECORD.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


def said(answers: states.Answers, name: str) -> list:
    """Return each process's value of a kind, or those of its threads."""
    return [
        answer[name] if name in answer else [thread[name] for thread in answer["threads"]]
        for answer in answers
    ]


def came_back(found: Experiment, name: str) -> bool:
    return said(found.after, name) == said(found.before, name)


def load_bearing(found: Experiment, name: str) -> bool:
    pairs = zip(said(found.before, name), said(found.twin, name), strict=True)
    differ = [before != twin for before, twin in pairs]
    return any(differ) if name in ONE_BIT else all(differ)


@pytest.mark.parametrize("name", NAMES)
def test_comes_back(experiment, name):
    assert said(experiment.after, name) == said(experiment.before, name)


@pytest.mark.parametrize("name", NAMES)
def test_is_load_bearing(experiment, name):
    assert load_bearing(experiment, name), said(experiment.twin, name)


@pytest.mark.parametrize("name", NAMES)
def test_processes_have_values_of_their_own(experiment, name):
    values = [json.dumps(value) for value in said(experiment.before, name)]
    if len(values) > 1 and name not in OF_THE_TREE:
        assert values[0] != values[1]


def test_nothing_is_left_out(experiment):
    assert set(experiment.report.states) == {"memory", *NAMES}


@pytest.mark.parametrize("suite", SUITES if EVERYTHING else SUITES[:1], indirect=True)
def test_chosen_kinds(suite, pool, tmp_path):
    """A group and a name: those outside, everything else inside, and all of it right."""
    vm = pool.get(suite)
    pids = states.start(vm, 1)
    before = states.ask(vm, pids)
    path = tmp_path / "images"
    path.mkdir()
    states.dump(vm, pids[0], path)
    report = states.restore_outside(vm, path, ["container", "comm"])
    assert set(report.states) == {*OF_THE_TREE, "comm"}
    after = states.ask(vm, pids)
    states.end(vm, pids)
    lost = {"personality"} | ({"no_new_privs", "capabilities"} if suite == "bookworm" else set())
    for name in NAMES:
        assert (said(after, name) == said(before, name)) == (name not in lost), name


def test_in_a_user_namespace(pool, tmp_path):
    """Ids, limits and scores are as the kernel has them, whatever the namespace calls them."""
    vm = pool.get("trixie")
    # One that may be dumped: CRIU gives its tasks an mm of its own user namespace, in which another
    # cannot open its own files of /proc any more (task_dump_owner() in fs/proc/base.c).
    inner = states.start(vm, 1, ("user", "pid", "mount"))
    pids = states.outer(vm, inner)
    before = states.ask(vm, pids)
    path = tmp_path / "images"
    path.mkdir()
    states.dump(vm, pids[0], path)
    states.restore_outside(vm, path, criu_options=("--root", ROOT))
    pids = states.outer(vm, inner)
    after = states.ask(vm, pids)
    root = pids[0]
    maps = vm.sh(f"cat /proc/{root}/uid_map /proc/{root}/gid_map").stdout.split()
    assert maps == [b"0", b"%d" % MAPPED, b"65536"] * 2
    states.end(vm, pids)
    for name in {*NAMES} - {"loginuid"}:  # left to CRIU in a user namespace
        assert said(after, name) == said(before, name), name
