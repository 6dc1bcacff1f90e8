"""Containers of podman in lab VMs: made of a tiny image and the guest's own /usr.

The image has directories and links only, so that making, saving and loading it takes podman no
time; programs and libraries come with a read-only bind mount of the guest's ``/usr``, which is the
same in all VMs of a suite.
"""

import json
from dataclasses import dataclass
from typing import Any

from ovr import lab
from ovr.lab.share import SHARE
from tests.vm import pool
from tests.vm.services.base import run

__all__ = [
    "CACHE", "GROWING", "PACKAGES", "POD", "Container", "load_image", "make_image", "podman",
    "redis",
]  # fmt: skip

PACKAGES = ("busybox-static", "crun", "libcriu2", "podman", "redis-server", "runc", "uidmap",
            "zstd")  # fmt: skip

_ENDINGS = {"none": "", "zstd": ".zst"}
_IMAGE = "localhost/tiny:1"
_MAKE = f"""
    mkdir -p /root/tiny && cd /root/tiny
    mkdir -p usr proc sys dev run tmp etc data root var && ln -sf usr/bin bin && ln -sf usr/lib lib
    ln -sf usr/lib64 lib64 && echo 'root:x:0:0:root:/root:/bin/sh' > etc/passwd
    tar -cf - . | podman import -q --change 'ENV PATH=/usr/bin' - {_IMAGE} >&2
    podman save -q -o {SHARE}/image.tar {_IMAGE}
"""


@dataclass(frozen=True)
class Container:
    """A container: how it is run, checkpointed, asked.

    Attributes:
        runtime: what runs it.
        options: of ``podman run``.
        command: what it runs.
        prepare: a shell script for it, run once it is up.
        packing: ``--compress`` of its checkpoint.
        ask: a shell script for it; what it prints is what must be the same after the restore.
    """

    name: str
    runtime: str
    options: str
    command: str
    prepare: str
    packing: str
    ask: str

    @property
    def archive(self) -> str:
        """The file name of its checkpoint."""
        return f"{self.name}.tar{_ENDINGS[self.packing]}"

    def start(self, vm: lab.LabVm) -> None:
        """Run it, and wait until it is prepared."""
        podman(
            vm,
            f"--runtime {self.runtime} run -d --name {self.name} --network none -v /usr:/usr:ro"
            f" {self.options} {_IMAGE} {self.command}",
        )
        self.exec(vm, self.prepare)

    def exec(self, vm: lab.LabVm, script: str) -> str:
        """Run a shell script in it."""
        quoted = script.replace("'", "'\\''")
        return podman(vm, f"exec {self.name} sh -ec '{quoted}'")

    def checkpoint(self, vm: lab.LabVm) -> None:
        """Checkpoint it into the share, and remove it."""
        path = f"{SHARE}/{self.archive}"
        podman(vm, f"container checkpoint -c {self.packing} --export {path} {self.name}")
        podman(vm, f"rm -v {self.name}")

    def answer(self, vm: lab.LabVm) -> str:
        """Return its answer about itself."""
        return self.exec(vm, self.ask)

    def inspect(self, vm: lab.LabVm) -> Any:
        """Return podman's data about it."""
        return json.loads(podman(vm, f"container inspect {self.name}"))[0]


_REDIS = 'redis-server --unixsocket /tmp/socket --enable-debug-command yes --save ""'


def redis(size: int) -> str:
    """A script that waits for redis and gives it about `size` bytes of data."""
    return f"""
        until redis-cli -s /tmp/socket ping >/dev/null 2>&1; do sleep 0.2; done
        redis-cli -s /tmp/socket debug populate {size // 600} key 500
        redis-cli -s /tmp/socket set answer 42
    """


CACHE = Container(
    name="web",  # as the documents call theirs
    runtime="crun",
    options="",
    command=_REDIS,
    prepare=redis(32 << 20),
    packing="zstd",
    ask="redis-cli -s /tmp/socket get answer; redis-cli -s /tmp/socket debug digest",
)

_WORKER = "n=0; while true; do n=$((n + 1)); echo $n > /data/count; sleep 0.1; done"
POD = Container(
    name="pod",
    runtime="runc",
    options="-v shelf:/data -e COLOUR=green --hostname pod --memory 300m",
    command=f"sh -c '({_WORKER}) & (exec sleep 1000000) & umask 027; {_REDIS}'",
    prepare=redis(8 << 20) + "echo kept > /data/note; echo new > /root/new; rm /etc/passwd",
    packing="none",
    ask="""
        redis-cli -s /tmp/socket get answer; redis-cli -s /tmp/socket debug digest
        cat /data/note /root/new; ls /etc/passwd 2>/dev/null || echo removed
        tr '\\0' '\\n' < /proc/1/environ | grep COLOUR; hostname; grep Umask /proc/1/status
        for task in /proc/[0-9]*; do
            case "$(tr '\\0' ' ' < $task/cmdline)" in
                "sleep 1000000 ") echo sleeper;;
                redis-server*) echo redis;;
            esac
        done | sort
        before=$(cat /data/count); sleep 1; test "$(cat /data/count)" != "$before" && echo counts
    """,
)


@dataclass(frozen=True)
class Growing(Container):
    """A container that is checkpointed in two steps; it runs a program of the pool."""

    program: pool.Program


_PROGRAM = pool.BY_NAME["private"]
GROWING = Growing(
    name="growing",
    runtime="runc",
    options=f"-v {pool.DIRECTORY}:{pool.DIRECTORY}",
    command=f"{_PROGRAM.path} {_PROGRAM.directory}",
    prepare=f"until test -s {_PROGRAM.directory}/ready; do sleep 0.1; done",
    packing="zstd",
    ask="true",
    program=_PROGRAM,
)


def make_image(vm: lab.LabVm) -> None:
    """Make the image, and leave it in the share."""
    run(vm, f"set -e; {_MAKE}", timeout=300)


def load_image(vm: lab.LabVm, path: str) -> None:
    """Load the image that another VM has made."""
    podman(vm, f"load -q -i {path}")


def podman(vm: lab.LabVm, words: str) -> str:
    """Run a command of podman, which must succeed."""
    return run(vm, f"podman {words}", timeout=300)
