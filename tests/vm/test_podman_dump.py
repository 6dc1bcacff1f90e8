"""Containers dumped from outside in one VM; stock podman and runtimes restore them in another one.

bookworm's CRIU does not run action scripts of its configuration for container engines (fixed in
CRIU 3.19), so this is about trixie.
"""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import ovr
from ovr import lab
from ovr.checkpoint import Archive
from ovr.dump import story
from ovr.dump.parent import parent_images
from ovr.errors import ArchiveFailed, OvrError, UsageError
from ovr.lab import demo
from ovr.lab.share import SHARE
from tests.documents import block, commands, said
from tests.documents import run as shell
from tests.vm.conftest import EVERYTHING, PREFIX, contained_in
from tests.vm.containers import CACHE, POD, Container, load_image, make_image, podman
from tests.vm.containers.bundle import BUNDLE, Plain
from tests.vm.services.base import run
from tests.vm.test_podman import HARDWARE

pytestmark = pytest.mark.timeout(1800)

LOCKED = Container(
    name="locked",
    runtime="crun",
    options="",
    command="sh -c 'exec 9> /tmp/lock; flock 9; exec sleep 1000000'",
    prepare="while flock -n /tmp/lock true; do sleep 0.1; done",
    packing="zstd",
    ask="flock -n /tmp/lock echo free || echo locked",
)
RUNTIMES = ("runc", "crun") if EVERYTHING else ("crun",)
PODS = (POD,) if EVERYTHING else ()  # which test_podman.py restores, and podman does the rest
EXPORTED = block("docs/podman.md", "--export web.tar.zst --vm libvirt:vm-a")
STREAMED = block("docs/podman.md", "--export - --vm libvirt:vm-a")
INCOMPLETE = block("docs/podman.md", "podman container inspect")
FROM_PYTHON = block("docs/podman.md", "vm.dump")
BUNDLED = block("docs/podman.md", "dump --container web --runtime runc")
DIRECTORY = "$(podman container inspect --format '{{.StaticDir}}' web)"


class Interrupted(Exception):
    """What interrupts a dump."""


@dataclass
class Origin:
    """The VM with the containers, and what was learnt there before they went."""

    vm: lab.LabVm
    share: Path
    answers: dict[str, str] = field(default_factory=dict)

    def dumped(self, documented: str, instead: dict[str, str]) -> dict[str, object]:
        """Do what a document says is done on the host, and return the report's fields."""
        ours = {
            "libvirt:vm-a": f"lab:{self.vm.name}",
            "ovr dump": "ovr dump --json --verify full",
            **instead,
        }
        report: dict[str, object] = json.loads(shell(said(documented, ours), self.share))
        return report


def status(vm: lab.LabVm, container: Container) -> str:
    return podman(vm, f"ps -a --filter name={container.name} --format '{{{{.Status}}}}'").split()[0]


def nothing_is_left(vm: lab.LabVm) -> bool:
    """No CRIU, no engine, no file of the agent's, no images of podman's, no frozen cgroup."""
    run(vm, "while pgrep -x 'criu|runc|crun|podman'; do sleep 0.2; done", timeout=300)
    left = run(vm, f"ls -d /run/ovr/restore-* {DIRECTORY}/checkpoint 2>/dev/null || true")
    frozen = run(vm, "cat $(find /sys/fs/cgroup -name cgroup.freeze)")
    return not left and "1" not in frozen


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Iterator[Origin]:
    share = tmp_path_factory.mktemp("containers")
    with demo.lab_vm(f"{PREFIX}podman-a", share=share, **HARDWARE) as vm:
        make_image(vm)
        origin = Origin(vm, share)
        CACHE.start(vm)
        origin.answers[CACHE.name] = CACHE.answer(vm)
        yield origin


@contained_in("test_ovr_is_killed_while_the_tree_is_held, and in the aborts of test_prepare.py")
def test_a_dump_that_fails_while_the_tree_is_held(origin, monkeypatch):
    """The container runs on, for podman as well, and nothing is left."""

    def interrupt(*_: object) -> int:
        raise Interrupted

    monkeypatch.setattr(story, "verify_pages", interrupt)
    with ovr.attach(f"lab:{origin.vm.name}") as vm, pytest.raises(Interrupted):
        vm.dump(container="web", export=origin.share / "never.tar")
    assert status(origin.vm, CACHE) == "Up"
    assert CACHE.answer(origin.vm) == origin.answers["web"]
    assert nothing_is_left(origin.vm)
    assert not [*origin.share.glob("never*"), *origin.share.glob(".ovr-*")]


def test_ovr_is_killed_while_the_tree_is_held(origin):
    """The container runs on, for podman as well."""
    killed = origin.share / "killed"
    killed.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "ovr", "dump", "--container", "web", "--export", "web.tar",
         "--vm", f"lab:{origin.vm.name}", "-v4", "--verify", "full"],
        cwd=killed, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        try:
            assert any("the tree is held" in line for line in process.stderr)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    run(origin.vm, "while pgrep -x 'criu|podman'; do sleep 0.2; done", timeout=300)
    assert status(origin.vm, CACHE) == "Up"
    assert CACHE.answer(origin.vm) == origin.answers["web"]
    assert nothing_is_left(origin.vm)
    # What the guest must not see is gone; the host's part is ours alone.
    (left,) = killed.iterdir()
    assert left.name.startswith(".ovr-dump-")
    shutil.rmtree(killed)


def test_criu_dumps_nothing_without_the_hook(origin):
    """The parent as it is until the hook has run makes CRIU fail, and the container runs on."""
    parent = origin.share / "parent"
    parent.mkdir()
    with ovr.attach(f"lab:{origin.vm.name}") as vm:
        levels = vm.kernel.space.levels
    for name, data in parent_images(range(1, 10), levels).items():
        (parent / f"ovr-held-{name}" if name == "inventory.img" else parent / name).write_bytes(
            data
        )
    said_by_podman = run(origin.vm, f"""
        printf 'track-mem\\nprev-images-dir {SHARE}/parent\\n' > /root/criu.conf
        mkdir -p /root/path; printf '#!/bin/sh\\nCRIU_CONFIG_FILE=/root/criu.conf exec \\
            /usr/sbin/criu "$@"\\n' > /root/path/criu; chmod +x /root/path/criu
        PATH=/root/path:$PATH podman container checkpoint --export /root/no.tar web 2>&1 || true
        grep 'no parent inventory' {DIRECTORY}/dump.log; rm -r {DIRECTORY}/checkpoint
    """, timeout=300)  # fmt: skip
    assert "no parent inventory" in said_by_podman
    assert status(origin.vm, CACHE) == "Up"


def test_containers_that_cannot_be_dumped(origin):
    vm = origin.vm
    with ovr.attach(f"lab:{vm.name}") as attached:
        for name, code in (("other", "no-container"), ("stopped", "not-running")):
            if name == "stopped":
                podman(vm, "create --name stopped localhost/tiny:1 true")
            with pytest.raises(UsageError) as caught:
                attached.dump(container=name, export=origin.share / "never.tar")
            assert caught.value.code == code
    podman(vm, "rm stopped")
    assert not [*origin.share.glob("never*"), *origin.share.glob(".ovr-*")]


def test_it_runs_on_after_a_dump(origin):
    vm, share = origin.vm, origin.share
    program = said(FROM_PYTHON, {"libvirt:vm-a": f"lab:{vm.name}"})
    printed = shell(f"python - <<'END'\n{program}\nEND", share)
    assert len(printed.strip()) == 64
    plan = shell(f"ovr dump --container web --export x.tar --dry-run --vm lab:{vm.name}", share)
    assert "outside: " in plan
    assert status(vm, CACHE) == "Up"
    assert nothing_is_left(vm)
    (share / "web.tar.zst").unlink()


def test_an_archive_goes_through_a_pipe(origin):
    vm, share = origin.vm, origin.share
    (command,) = commands(STREAMED, "on the host")
    ours = {
        "libvirt:vm-a": f"lab:{vm.name}", "ovr dump": "ovr dump --leave-running",
        "ssh backup": "sh -c", "web.tar.zst": "piped.tar.zst",
    }  # fmt: skip
    assert not shell(said(command, ours), share)
    with Archive.open(share / "piped.tar.zst") as archive:
        assert archive.container.name == CACHE.name
        assert sum(len(one.entries) for one in archive.images.memories) > 0
    assert status(vm, CACHE) == "Up"
    assert nothing_is_left(vm)
    (share / "piped.tar.zst").unlink()


def test_podman_fails_after_the_end(origin):
    """The images stay, and podman restores the container from them as the document says."""
    vm, file = origin.vm, origin.share / "web.tar.zst"
    run(vm, f"rm -f {DIRECTORY}/devshm-checkpoint.tar; mkdir {DIRECTORY}/devshm-checkpoint.tar")
    with ovr.attach(f"lab:{vm.name}") as attached, pytest.raises(ArchiveFailed) as caught:
        attached.dump(container="web", export=file)
    assert "web.tar.zst.images" in caught.value.hint
    assert not file.exists()
    run(vm, f"rmdir {DIRECTORY}/devshm-checkpoint.tar")
    run(vm, "while pgrep -x redis-server; do sleep 0.2; done")
    run(vm, f"set -e; cd {SHARE}; {'; '.join(commands(INCOMPLETE))}", timeout=300)
    assert CACHE.answer(vm) == origin.answers["web"]


@pytest.fixture(scope="module")
def destination(origin, tmp_path_factory) -> Iterator[lab.LabVm]:
    """A fresh VM; all containers of the other one are dumped, and that is gone."""
    vm, share = origin.vm, origin.share
    for container in (*PODS, LOCKED):
        container.start(vm)
        origin.answers[container.name] = container.answer(vm)
    for plain in map(Plain, RUNTIMES):
        plain.prepare(vm)
        plain.start(vm)
        origin.answers[plain.name] = plain.answer(vm)
        ours = {
            "container web": f"container {plain.name}", "runtime runc": f"runtime {plain.runtime}",
            "images": plain.name,
        }  # fmt: skip
        report = origin.dumped(BUNDLED, ours)
        assert report["container"] == plain.name
        run(vm, f"! {plain.runtime} state {plain.name}")
    (exported,) = commands(EXPORTED, "on the host")
    report = origin.dumped(exported, {"container web": "container web --pre-copy"})
    assert report["bytes_outside"] == report["bytes_total"] > 30 << 20
    with ovr.attach(f"lab:{vm.name}") as attached:
        for pod in PODS:
            saved = attached.dump(container=pod.name, export=share / pod.archive, verify="full")
            assert saved.bytes_outside > 0.95 * saved.bytes_total
        attached.dump(
            container="locked", export=share / LOCKED.archive, criu_options=["--file-locks"]
        )
    assert {status(vm, one) for one in (CACHE, *PODS)} == {"Exited"}
    assert nothing_is_left(vm)
    vm.down()
    with demo.lab_vm(f"{PREFIX}podman-b", share=share, **HARDWARE) as other:
        load_image(other, f"{SHARE}/image.tar")
        yield other


@pytest.mark.parametrize("container", [CACHE, *PODS], ids=lambda one: one.name)
def test_stock_podman_restores_the_archive(origin, destination, container):
    (restore,) = commands(EXPORTED, "in VM B, or ovr restore as above")
    run(
        destination, f"cd {SHARE}; {restore.replace('web.tar.zst', container.archive)}", timeout=300
    )
    assert container.answer(destination) == origin.answers[container.name]
    podman(destination, f"rm -f -t 0 -v {container.name}")


def test_ovr_restores_the_archive(origin, destination):
    with ovr.attach(f"lab:{destination.name}") as vm:
        report = vm.restore(archive=origin.share / "web.tar.zst", verify="full")
    assert report.bytes_outside > 0.95 * report.bytes_total
    assert CACHE.answer(destination) == origin.answers["web"]
    podman(destination, "rm -f -t 0 web")


def test_a_file_lock_is_held_again(origin, destination):
    assert origin.answers["locked"].strip() == "locked"
    podman(destination, f"container restore --file-locks --import {SHARE}/{LOCKED.archive}")
    assert LOCKED.answer(destination) == origin.answers["locked"]
    podman(destination, "rm -f -t 0 locked")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_runtime_restores_its_images(origin, destination, runtime):
    plain = Plain(runtime)
    plain.prepare(destination)
    run(
        destination,
        f"{runtime} restore --detach --image-path {SHARE}/{plain.name} --bundle {BUNDLE}"
        f" {plain.name} </dev/null >/dev/null 2>&1",
        timeout=300,
    )
    assert plain.answer(destination) == origin.answers[plain.name]
    plain.end(destination)


def test_old_criu(pool, tmp_path):
    """bookworm's CRIU would not run the hook: nothing is begun."""
    with ovr.attach(f"lab:{pool.get('bookworm').name}") as vm, pytest.raises(OvrError) as caught:
        vm.dump(container="web", export=tmp_path / "web.tar")
    assert caught.value.exit_code == 4
    assert [*tmp_path.iterdir()] == []
