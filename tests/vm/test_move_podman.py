"""Containers of podman that are moved between two VMs, while they run.

bookworm's CRIU does not run action scripts for container engines, so this is about trixie.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

import ovr
from ovr import lab
from ovr.errors import AttemptFailed, CheckFailed, CriuFailed
from ovr.guest.client.agent import Agent
from ovr.lab import demo
from ovr.lab.share import SHARE
from tests.vm.conftest import PREFIX
from tests.vm.containers import CACHE, POD, Container, load_image, make_image, podman
from tests.vm.services.base import run
from tests.vm.test_move import Pair, decided, move
from tests.vm.test_podman import HARDWARE

pytestmark = pytest.mark.timeout(1800)

ALWAYS = replace(CACHE, name="always", options="--restart=always")


class Interrupted(Exception):
    """What interrupts a move."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[Pair]:
    share = tmp_path_factory.mktemp("containers")
    with (
        demo.lab_vm(f"{PREFIX}podman-one", share=share, **HARDWARE) as one,
        demo.lab_vm(f"{PREFIX}podman-other", share=share, **HARDWARE) as other,
    ):
        make_image(one)
        load_image(other, f"{SHARE}/image.tar")
        yield Pair(one, other)


@pytest.fixture
def cache(pair) -> Iterator[Container]:
    """A container of the first VM; at the end it is in one of both, or in none."""
    CACHE.start(pair.one)
    yield CACHE
    for vm in pair.both:
        podman(vm, f"rm -f -t 0 --ignore {CACHE.name}")


def names(vm: lab.LabVm) -> list[str]:
    return podman(vm, "ps -a --format '{{.Names}} {{.State}}'").split("\n")[:-1]


def nothing_is_left(vm: lab.LabVm) -> bool:
    """No CRIU, no engine, no file of the agent's, no cgroup of a move, nothing frozen."""
    run(vm, "while pgrep -x 'criu|runc|crun|podman'; do sleep 0.2; done", timeout=300)
    left = run(vm, "ls -d /run/ovr/restore-* 2>/dev/null || true")
    groups = run(vm, "find /sys/fs/cgroup -name 'ovr-move-*'")
    frozen = run(vm, "cat $(find /sys/fs/cgroup -name cgroup.freeze)")
    return not left and not groups and "1" not in frozen


def goes_on(pair: Pair, container: Container, answer: str) -> None:
    """Check that it is whole in the first VM, that the other has nothing, and nothing is left."""
    assert container.answer(pair.one) == answer
    assert names(pair.one) == [f"{container.name} running"]
    assert names(pair.other) == []
    for vm in pair.both:
        assert nothing_is_left(vm)


@pytest.mark.parametrize("container", [CACHE, POD], ids=lambda one: one.name)
def test_there_and_back(pair, container):
    container.start(pair.one)
    answer = container.answer(pair.one)
    for source, destination in (pair.both, pair.both[::-1]):
        report = move(source, destination, container.name)
        assert report.bytes_outside > 0.95 * report.bytes_total
        assert report.bytes_verified >= report.bytes_outside
        assert report.skeleton_why.startswith("podman")
        assert names(source) == []
        assert names(destination) == [f"{container.name} running"]
        assert container.answer(destination) == answer
        assert container.inspect(destination)["Id"] == report.container
        assert nothing_is_left(source)
        assert nothing_is_left(destination)
        # podman does not restore into a volume that exists.
        podman(source, "volume prune -f")
    podman(pair.one, f"rm -f -t 0 {container.name}")
    podman(pair.one, "volume prune -f")


def test_a_restart_policy_starts_no_second_one(pair):
    """By the command, too."""
    ALWAYS.start(pair.one)
    answer = ALWAYS.answer(pair.one)
    done = subprocess.run(
        [sys.executable, "-m", "ovr", "move", "--container", ALWAYS.name, "--json",
         "--from", f"lab:{pair.one.name}", "--to", f"lab:{pair.other.name}"],
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["container"] == ALWAYS.inspect(pair.other)["Id"]
    assert report["seconds"]["archive"] > 0
    assert ALWAYS.answer(pair.other) == answer
    assert nothing_is_left(pair.one)
    assert names(pair.one) == []
    assert not run(pair.one, "pgrep -x redis-server || true")
    podman(pair.other, f"rm -f -t 0 {ALWAYS.name}")


def test_a_container_that_is_there(pair, cache):
    answer = cache.answer(pair.one)
    podman(pair.other, "create --name web localhost/tiny:1 true")
    with pytest.raises(CheckFailed) as caught:
        move(pair.one, pair.other, "web")
    assert caught.value.code == "preflight"
    podman(pair.other, "rm web")
    goes_on(pair, cache, answer)


def test_a_destination_that_cannot_build_it(pair, cache):
    """Its podman cannot pull the image."""
    answer = cache.answer(pair.one)
    podman(pair.other, "rmi -f localhost/tiny:1")
    try:
        with pytest.raises(CriuFailed):
            move(pair.one, pair.other, "web")
    finally:
        load_image(pair.other, f"{SHARE}/image.tar")
    goes_on(pair, cache, answer)


def test_podman_of_the_source_fails(pair, cache):
    answer = cache.answer(pair.one)
    directory = podman(pair.one, "container inspect --format '{{.StaticDir}}' web").strip()
    run(
        pair.one,
        f"rm -f {directory}/devshm-checkpoint.tar; mkdir {directory}/devshm-checkpoint.tar",
    )
    with pytest.raises(AttemptFailed):
        move(pair.one, pair.other, "web")
    run(pair.one, f"rmdir {directory}/devshm-checkpoint.tar")
    goes_on(pair, cache, answer)


def test_ovr_is_killed_when_it_is_prepared(pair, cache):
    """In doubt, and taken back."""
    answer = cache.answer(pair.one)
    with subprocess.Popen(
        [sys.executable, "-m", "ovr", "move", "--container", "web", "-v4", "--verify", "full",
         "--from", f"lab:{pair.one.name}", "--to", f"lab:{pair.other.name}"],
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        try:
            assert any("skeleton stands" in line for line in process.stderr)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    run(pair.other, "while pgrep -x 'criu|podman|redis-server'; do sleep 0.2; done", timeout=300)
    decided(pair, finish=False)
    goes_on(pair, cache, answer)


def test_a_move_in_doubt_is_finished(pair, cache, monkeypatch):
    """The destination runs it, and the link to the source broke before it could be told."""
    answer = cache.answer(pair.one)
    with monkeypatch.context() as patch:
        patch.setattr(Agent, "end_dump", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(ovr.errors.MoveInDoubt):
            move(pair.one, pair.other, "web")
    assert cache.answer(pair.other) == answer
    decided(pair, finish=True)
    assert names(pair.one) == []
    assert cache.answer(pair.other) == answer
    for vm in pair.both:
        assert nothing_is_left(vm)
