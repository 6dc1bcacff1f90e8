"""podman's containers, checkpointed in one VM, restored into another from outside.

The guests have stock podman, crun, runc and CRIU. bookworm's CRIU does not run action scripts of
its configuration for container engines (fixed in CRIU 3.19), so this is about trixie.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

import ovr
from ovr import demo, lab
from ovr.errors import CriuFailed, RestoreFailed
from ovr.state import settings
from tests.vm.conftest import EVERYTHING, PREFIX
from tests.vm.containers import CACHE, PACKAGES, POD, Container, load_image, make_image, podman
from tests.vm.containers.bundle import BUNDLE, Plain
from tests.vm.services.base import run

pytestmark = pytest.mark.timeout(1800)

RUNTIMES = ("runc", "crun") if EVERYTHING else ("runc",)
HARDWARE = {"suite": "trixie", "memory": "1G", "packages": PACKAGES}


@dataclass(frozen=True)
class Journey:
    """A fresh VM with podman, and what the host has from another one."""

    vm: lab.LabVm
    directory: Path
    answers: dict[str, str]

    def restore(self, container: Container, **options: object) -> ovr.Report:
        with ovr.attach(f"lab:{self.vm.name}") as vm:
            archive = self.directory / container.archive
            return vm.restore(archive=archive, verify="full", **options)

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
            container.checkpoint(vm)
        for plain in map(Plain, RUNTIMES):
            plain.prepare(vm)
            plain.start(vm)
            answers[plain.name] = plain.answer(vm)
            plain.checkpoint(vm)
    with demo.lab_vm(f"{PREFIX}podman-b", share=share, **HARDWARE) as vm:
        yield Journey(vm, share, answers)


def test_podman_says_what_is_missing(journey):
    with pytest.raises(CriuFailed, match="podman in the guest failed") as caught:
        journey.restore(CACHE)
    assert "localhost/tiny" in str(caught.value)
    assert journey.nothing_is_left()
    load_image(journey.vm, "/mnt/share/image.tar")


def test_a_tree_that_is_wrong_never_runs(journey, monkeypatch):
    """An error while podman waits for its CRIU: podman fails, and cleans up after itself."""

    def fail(*_: object) -> None:
        assert run(journey.vm, "pgrep -x redis-server")
        raise RestoreFailed("as if it were wrong")

    monkeypatch.setattr(settings, "verify", fail)
    with pytest.raises(RestoreFailed, match="as if it were wrong"):
        journey.restore(CACHE)
    assert journey.nothing_is_left()


@pytest.mark.parametrize("container", [CACHE, POD], ids=lambda container: container.runtime)
def test_goes_on_as_podmans_container(journey, container):
    report = journey.restore(container)
    assert report.bytes_outside >= 0.95 * (report.bytes_total - report.bytes_cow)
    found = container.inspect(journey.vm)
    assert found["Id"] == report.container
    assert found["State"]["Status"] == "running"
    assert found["OCIRuntime"] == container.runtime
    assert container.answer(journey.vm) == journey.answers[container.name]
    assert "Ready to accept connections" in podman(journey.vm, f"logs {container.name}")
    podman(journey.vm, f"stop -t 60 {container.name}")
    assert container.inspect(journey.vm)["State"]["Status"] == "exited"
    podman(journey.vm, f"rm -v {container.name}")
    podman(journey.vm, "volume rm --all --force")
    assert journey.nothing_is_left()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_goes_on_in_its_bundle(journey, runtime):
    """Without podman: the runtime restores its own images."""
    plain = Plain(runtime)
    plain.prepare(journey.vm)
    with ovr.attach(f"lab:{journey.vm.name}") as vm:
        report = vm.restore(
            journey.directory / plain.name, runtime=runtime, bundle=BUNDLE, name=plain.name,
            verify="full",
        )  # fmt: skip
    assert report.container == plain.name
    assert report.bytes_outside >= 0.95 * report.bytes_total
    assert plain.state(journey.vm) == "running"
    assert plain.answer(journey.vm) == journey.answers[plain.name]
    plain.end(journey.vm)
    assert journey.nothing_is_left()
