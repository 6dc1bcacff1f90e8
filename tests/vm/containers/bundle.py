"""A container that runc or crun runs without podman: a bundle, made alike in every VM.

Under runc it has a user namespace of its own; crun has CRIU dump none.
"""

import copy
import json
from typing import Any

from ovr import lab
from ovr.lab.share import SHARE
from tests.vm.containers import redis
from tests.vm.services.base import run

__all__ = ["BUNDLE", "Plain"]

BUNDLE = "/srv/bundle"

_IDS = {"containerID": 0, "hostID": 200_000, "size": 65_536}
_FLAGS = ["nosuid", "nodev", "noexec"]
_CONFIG = {
    "ociVersion": "1.0.2",
    "process": {
        "user": {"uid": 0, "gid": 0},
        "args": ["redis-server", "--port", "0", "--unixsocket", "/tmp/socket", "--save", "",
                 "--enable-debug-command", "yes"],
        "env": ["PATH=/usr/bin", "COLOUR=blue"],
        "cwd": "/",
    },
    "root": {"path": "rootfs"},
    "hostname": "plain",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": _FLAGS},
        {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
    ],
    "linux": {"namespaces": [{"type": name} for name in ("pid", "mount", "ipc", "uts")]},
}  # fmt: skip


def _config(runtime: str) -> dict[str, Any]:
    config: dict[str, Any] = copy.deepcopy(_CONFIG)
    if runtime == "runc":
        config["linux"]["namespaces"].append({"type": "user"})
        config["linux"] |= {"uidMappings": [_IDS], "gidMappings": [_IDS]}
    return config


class Plain:
    """A redis, run by `runtime`."""

    def __init__(self, runtime: str) -> None:
        self.runtime = runtime
        self.name = f"plain-{runtime}"

    def prepare(self, vm: lab.LabVm) -> None:
        """Make the bundle."""
        run(
            vm,
            f"""
            set -e; mkdir -p {BUNDLE}/rootfs && cd {BUNDLE}/rootfs
            mkdir -p usr proc sys dev tmp etc
            ln -sfn usr/bin bin; ln -sfn usr/lib lib; ln -sfn usr/lib64 lib64
            cat > {BUNDLE}/config.json
            """,
            json.dumps(_config(self.runtime)).encode(),
        )

    def start(self, vm: lab.LabVm) -> None:
        """Run it, and wait until it has its data."""
        self._run(vm, f"run --detach --bundle {BUNDLE} {self.name} </dev/null >/dev/null 2>&1")
        self.exec(vm, redis(8 << 20))

    def checkpoint(self, vm: lab.LabVm) -> None:
        """Checkpoint it into a directory of the share that has its name."""
        self._run(vm, f"checkpoint --image-path {SHARE}/{self.name} {self.name}")
        self._run(vm, f"delete --force {self.name}")

    def exec(self, vm: lab.LabVm, script: str) -> str:
        """Run a shell script in it."""
        return self._run(vm, f"exec {self.name} sh -ec '{script}'")

    def answer(self, vm: lab.LabVm) -> str:
        """Return its answer about itself."""
        client = "redis-cli -s /tmp/socket"
        return self.exec(vm, f"{client} get answer; {client} debug digest; hostname; echo $COLOUR")

    def ids(self, vm: lab.LabVm) -> str:
        """The map of its user ids."""
        return run(vm, "cat /proc/$(pgrep -o -x redis-server)/uid_map")

    def state(self, vm: lab.LabVm) -> str:
        """Return its runtime's data about it."""
        return str(json.loads(self._run(vm, f"state {self.name}"))["status"])

    def end(self, vm: lab.LabVm) -> None:
        """Kill and remove it."""
        self._run(vm, f"delete --force {self.name}")

    def _run(self, vm: lab.LabVm, words: str) -> str:
        return run(vm, f"{self.runtime} {words}", timeout=300)
