"""podman's containers, checkpointed in one VM, restored into another from outside.

The guests have stock podman, crun, runc and CRIU. bookworm's CRIU does not run action scripts of
its configuration for container engines (fixed in CRIU 3.19), so this is about trixie.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import ovr
from ovr import lab
from ovr.attempt import settings
from ovr.checkpoint import Archive
from ovr.errors import AttemptFailed, CriuFailed
from ovr.lab import demo
from ovr.lab.share import SHARE
from ovr.plan import make_plan
from tests.documents import block, commands, said
from tests.documents import run as shell
from tests.vm import pool
from tests.vm.conftest import EVERYTHING, PREFIX, contained_in
from tests.vm.containers import (
    CACHE,
    GROWING,
    PACKAGES,
    POD,
    Container,
    make_image,
    podman,
    rootless,
)
from tests.vm.containers.bundle import Plain
from tests.vm.services.base import run

pytestmark = pytest.mark.timeout(1800)

RUNTIMES = ("runc", "crun") if EVERYTHING else ("runc",)
MOVED = block("docs/podman.md", "podman load")
RENAMED = block("docs/podman.md", "--name web2 --")
FROM_PYTHON = block("docs/podman.md", "vm.restore")
INCREMENTAL = block("docs/podman.md", "--with-previous")
INCREMENTED = {"web": GROWING.name}
BUNDLED = block("docs/podman.md", "--bundle")
SHOWN = block("README.md", "podman container checkpoint")
LOGGED = "Ready to accept connections"  # by redis, in VM A
# One vCPU: podman's first container has the kernel patch itself, which TCG may not bear with two.
HARDWARE = {"suite": "trixie", "memory": "1G", "cpus": 1, "packages": PACKAGES}


@dataclass(frozen=True)
class Journey:
    """A fresh VM with podman, and what the host has from another one."""

    vm: lab.LabVm
    directory: Path
    answers: dict[str, str]

    def restore(self, container: Container) -> ovr.Report:
        with ovr.attach(f"lab:{self.vm.name}") as vm:
            return vm.restore(archive=self.directory / container.archive, verify="full")

    def restored(self, documented: str, instead: Mapping[str, str] = MappingProxyType({})) -> Any:
        """Do what a document says is done on the host, and return the report's fields."""
        ours = {
            "libvirt:vm-b": f"lab:{self.vm.name}",
            "ovr restore": "ovr restore --json --verify full",
            **instead,
        }
        return json.loads(shell(said(documented, ours), self.directory))

    def nothing_is_left(self) -> bool:
        """Neither processes nor containers; conmon still cleans up for a moment."""
        names = "redis-server|conmon|crun|runc|criu|podman"
        run(self.vm, f"while pgrep -x '{names}'; do sleep 0.2; done", timeout=300)
        return podman(self.vm, "ps -aq") + podman(self.vm, "volume ls -q") == ""


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    share = tmp_path_factory.mktemp("containers")
    answers = {}
    with demo.lab_vm(f"{PREFIX}podman-a", share=share, **HARDWARE) as vm:
        make_image(vm)
        for container in (CACHE, POD):
            container.start(vm)
            answers[container.name] = container.answer(vm)
        perform(vm, MOVED, "in VM A")
        POD.checkpoint(vm)
        pool.install(vm, GROWING.program)
        GROWING.start(vm)
        for command in commands(INCREMENTAL, "in VM A"):
            assert pool.ask(vm, GROWING.program)["ok"]  # it writes to some of its pages, too
            run(vm, f"cd {SHARE}; {said(command, INCREMENTED)}", timeout=300)
        for plain in map(Plain, RUNTIMES):
            plain.prepare(vm)
            plain.start(vm)
            answers[plain.name] = plain.answer(vm)
            plain.checkpoint(vm)
        rootless.prepare(vm)
        rootless.start(vm)
        answers["rootless"] = rootless.answer(vm)
        rootless.checkpoint(vm)
    with demo.lab_vm(f"{PREFIX}podman-b", share=share, **HARDWARE) as vm:
        yield Journey(vm, share, answers)


def perform(vm: lab.LabVm, documented: str, where: str) -> str:
    """Run the commands of a block that belong there; files are in the directory shared with us."""
    lines = commands(documented, where)
    assert lines
    return run(vm, f"set -e; cd {SHARE}; {'; '.join(lines)}", timeout=300)


def test_podman_says_what_is_missing(journey):
    with pytest.raises(CriuFailed, match="podman in the guest failed") as caught:
        journey.restore(CACHE)
    assert "localhost/tiny" in str(caught.value)
    assert journey.nothing_is_left()
    perform(journey.vm, MOVED, "in VM B, unless it has the image")


def test_a_tree_that_is_wrong_never_runs(journey, monkeypatch):
    """An error while podman waits for its CRIU: podman fails, and cleans up after itself."""

    def fail(*_: object) -> None:
        assert run(journey.vm, "pgrep -x redis-server")
        raise AttemptFailed("as if it were wrong")

    monkeypatch.setattr(settings, "verify", fail)
    with pytest.raises(AttemptFailed, match="as if it were wrong"):
        journey.restore(CACHE)
    assert journey.nothing_is_left()


def test_goes_on_as_podmans_container(journey):
    """README and docs/podman.md say the same; podman's log comes along."""
    assert commands(SHOWN, "in VM A") == commands(MOVED, "in VM A")
    [command] = commands(MOVED, "on the host")
    assert commands(SHOWN, "on the host") == [command]
    report = journey.restored(command)
    assert LOGGED in perform(journey.vm, SHOWN, "in VM B")
    goes_on(journey, CACHE, CACHE, report)


@contained_in("test_from_python, which restores the same container under another name")
def test_a_pod_goes_on(journey):
    """Several processes, a volume, a changed root file system; under runc."""
    goes_on(journey, POD, POD, journey.restore(POD).as_json())


@contained_in("test_from_python; test_goes_on_in_its_bundle has the command's --name")
def test_under_another_name(journey):
    goes_on(journey, CACHE, replace(CACHE, name="web2"), journey.restored(RENAMED))


def test_from_python(journey, monkeypatch, capsys):
    """A pod: several processes, a volume, a changed root file system; under runc."""
    monkeypatch.chdir(journey.directory)
    ours = {
        "libvirt:vm-b": f"lab:{journey.vm.name}",
        '"web.tar.zst",': f'"{POD.archive}", verify="full",',
    }
    names: dict[str, Any] = {}
    exec(said(FROM_PYTHON, ours), names)
    report = names["report"].as_json()
    assert capsys.readouterr().out == f"{report['container']}\n"
    goes_on(journey, POD, replace(POD, name="web2"), report)


def goes_on(journey, was, container, report):
    """The container of VM A is podman's in VM B, and can be ended as any other."""
    assert report["bytes_outside"] >= 0.95 * (report["bytes_total"] - report["bytes_cow"])
    found = container.inspect(journey.vm)
    assert found["Id"] == report["container"]
    assert found["State"]["Status"] == "running"
    assert found["OCIRuntime"] == container.runtime
    assert container.answer(journey.vm) == journey.answers[was.name]
    assert LOGGED in podman(journey.vm, f"logs {container.name}")
    podman(journey.vm, f"stop -t 1 {container.name}")  # a shell as pid 1 does not hear it
    assert container.inspect(journey.vm)["State"]["Status"] == "exited"
    podman(journey.vm, f"rm -v {container.name}")
    podman(journey.vm, "volume rm --all --force")
    assert journey.nothing_is_left()


def test_an_incremental_checkpoint(journey):
    """Memory from two archives; the program checks every word of it."""
    pool.install(journey.vm, GROWING.program)
    previous = journey.directory / "before.tar.zst"
    with Archive.open(journey.directory / GROWING.archive, previous) as archive:
        levels = {level for task in make_plan(archive.images).tasks for level in task.pieces}
    assert levels == {0, 1}
    [command] = commands(INCREMENTAL, "on the host")
    report = journey.restored(command, INCREMENTED)
    assert report["bytes_outside"] >= 0.95 * report["bytes_total"]
    answer = pool.ask(journey.vm, GROWING.program)
    assert answer["ok"], answer["wrong"]
    podman(journey.vm, f"rm -f -t 0 {GROWING.name}")
    assert journey.nothing_is_left()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_goes_on_in_its_bundle(journey, runtime):
    """Without podman: the runtime restores its own images."""
    plain = Plain(runtime)
    plain.prepare(journey.vm)
    ours = {
        "--runtime runc": f"--runtime {runtime}",
        "images/": f"{plain.name}/",
        "--name web": f"--name {plain.name}",
    }
    report = journey.restored(BUNDLED, ours)
    assert report["container"] == plain.name
    assert report["bytes_outside"] >= 0.95 * report["bytes_total"]
    assert plain.state(journey.vm) == "running"
    mapped = ["0", "200000", "65536"] if runtime == "runc" else ["0", "0", "4294967295"]
    assert plain.ids(journey.vm).split() == mapped
    assert plain.answer(journey.vm) == journey.answers[plain.name]
    plain.end(journey.vm)
    assert journey.nothing_is_left()


def test_a_rootless_container_goes_on(journey):
    """With its namespaces and mounts, though podman itself dumps none."""
    rootless.prepare(journey.vm)
    with ovr.attach(f"lab:{journey.vm.name}") as vm:
        images = journey.directory / "rootless"
        report = vm.restore(images, criu_options=rootless.restore_options(), verify="full")
    assert report.bytes_outside >= 0.95 * report.bytes_total
    assert rootless.ids(journey.vm) == rootless.IDS
    assert rootless.answer(journey.vm) == journey.answers["rootless"]
    rootless.end(journey.vm)
