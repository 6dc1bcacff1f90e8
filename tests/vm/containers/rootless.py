"""A container of rootless podman: its tree has a user namespace, and all that podman mounts.

podman refuses to checkpoint it ("checkpointing a container requires root"), so does runc. CRIU
dumps its tree, run by root. What podman binds into it comes from elsewhere at a restore.
"""

from ovr import lab
from ovr.lab.share import SHARE
from tests.vm.containers import redis
from tests.vm.services.base import run

__all__ = [
    "IDS", "answer", "checkpoint", "end", "ids", "podman", "prepare", "restore_options", "start",
]  # fmt: skip

IDS = [["0", "1000", "1"], ["1", "100000", "65536"]]
"""The map of its ids: the user's own, and those that are its subordinates."""

_HOME = "/srv/rootless"
_ROOT = f"{_HOME}/root"
_FILES = "/run/rootless"  # mounted as podman's own files are
_ENVIRONMENT = "HOME=/home/u XDG_RUNTIME_DIR=/run/user/1000 PATH=$PATH"
_DEVICES = ("null", "zero", "full", "tty", "random", "urandom")
_BOUND = {
    **{f"/etc/{name}": f"{_FILES}/{name}" for name in ("hosts", "hostname")},
    "/run/.containerenv": f"{_FILES}/.containerenv",
    **{f"/dev/{name}": f"/dev/{name}" for name in _DEVICES},
    **{f"/proc/{name}": "/dev/null" for name in ("kcore", "keys", "timer_list")},
    "/sys/fs/cgroup": "/sys/fs/cgroup",
    "/usr": "/usr",
}
_COMMAND = 'redis-server --port 0 --unixsocket /tmp/socket --enable-debug-command yes --save ""'


def prepare(vm: lab.LabVm) -> None:
    """Make the user, the container's root file system, and what is bound into it at a restore."""
    run(vm, f"""
        set -e; id u >/dev/null 2>&1 || useradd -m -u 1000 u
        echo u:100000:65536 | tee /etc/subuid > /etc/subgid
        mkdir -p /run/user/1000 {_FILES} {_ROOT}; chmod 700 /run/user/1000
        cd {_ROOT}; mkdir -p usr proc sys dev tmp etc run var root home
        ln -sfn usr/bin bin; ln -sfn usr/lib lib; ln -sfn usr/lib64 lib64
        echo root:x:0:0:root:/root:/bin/sh > etc/passwd
        touch etc/hosts etc/hostname run/.containerenv
        chown -R u:u {_HOME} /run/user/1000
        touch {" ".join(path for path in _BOUND.values() if path.startswith(_FILES))}
        mountpoint -q {_ROOT} || mount --bind {_ROOT} {_ROOT}
    """)  # fmt: skip


def podman(vm: lab.LabVm, words: str) -> str:
    """Run a command of podman as the user; return what it prints, errors too, even if it fails."""
    user = "setpriv --reuid 1000 --regid 1000 --init-groups"
    command = f"cd /; {user} env -i {_ENVIRONMENT} podman {words} 2>&1; true"
    return run(vm, command, timeout=300)


def start(vm: lab.LabVm) -> None:
    """Run redis in it, and wait until it has its data."""
    options = "--log-driver none --network none --cgroups disabled -v /usr:/usr:ro"
    podman(vm, f"run -d --name rootless {options} --rootfs {_ROOT} {_COMMAND}")
    _exec(vm, redis(8 << 20))


def checkpoint(vm: lab.LabVm) -> None:
    """Have CRIU dump its tree, which ends it, into a directory of the share: podman does not."""
    assert "checkpointing a container requires root" in podman(vm, "container checkpoint rootless")
    bound = " ".join(f"--external 'mnt[{inside}]:{inside}'" for inside in _BOUND)
    run(vm, f"""
        mkdir {SHARE}/rootless
        criu dump -t $({_PID}) -D {SHARE}/rootless -v2 -o dump.log {bound}
    """, timeout=300)  # fmt: skip
    podman(vm, "rm --force --time 0 rootless")


def restore_options() -> tuple[str, ...]:
    """Options for CRIU at a restore."""
    bound = [("--external", f"mnt[{inside}]:{outside}") for inside, outside in _BOUND.items()]
    return ("--root", _ROOT, *(word for pair in bound for word in pair))


def answer(vm: lab.LabVm) -> str:
    """Return redis's answers about its data."""
    client = "redis-cli -s /tmp/socket"
    return _exec(vm, f"{client} get answer; {client} debug digest; hostname")


def ids(vm: lab.LabVm) -> list[list[str]]:
    """The map of its user ids, as the VM has it."""
    return [line.split() for line in run(vm, f"cat /proc/$({_PID})/uid_map").splitlines()]


def end(vm: lab.LabVm) -> None:
    """Kill it."""
    run(vm, f"kill -9 $({_PID}); while pgrep -x redis-server; do sleep 0.2; done")


_PID = "pgrep -o -x redis-server"


def _exec(vm: lab.LabVm, script: str) -> str:
    enter = f"nsenter -t $({_PID}) -U -m -u -S 0 -G 0"
    return run(vm, f"{enter} sh -ec '{script}'", timeout=300)
