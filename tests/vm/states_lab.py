"""`programs/states` on a lab VM: started, dumped, restored, asked."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import ovr
from ovr import lab
from ovr.images import ImageSet
from ovr.images.rewrite import image_chunks
from ovr.lab.tools import run_tool
from ovr.lab.workload import build_workload
from ovr.plan import NO_POOL, build_inside, make_plan
from tests.vm import pool

SOURCE = Path(__file__).parent / "programs" / "states"
PROGRAM = "/usr/local/bin/ovr-states"
DIRECTORY = "/var/lib/ovr-states"
IMAGES = "/tmp/ovr-states-images"
FIRST_PID = 21_000

RAISED = ("core", "memlock", "msgqueue", "nproc", "sigpending")
UNLIMITED = ("prlimit", "--nice=40", "--rtprio=99", *(f"--{name}=unlimited" for name in RAISED))
"""Within a user namespace limits can only be lowered."""

Answers = list[dict]
"""The answer of each process about itself, the root first."""


def build() -> Path:
    return build_workload(SOURCE, "-D_GNU_SOURCE", "-pthread")


def start(vm: lab.LabVm, processes: int, namespaces: Sequence[str] = ()) -> list[int]:
    """Start the program and return its pids, the root's first, as the program sees them."""
    vm.sh(f"rm -rf {DIRECTORY} {IMAGES}; mkdir -p {DIRECTORY} {IMAGES}")
    vm.put(build(), PROGRAM, 0o755)
    if namespaces:
        vm.sh(f"chown {pool.MAPPED}:{pool.MAPPED} {DIRECTORY}")
        pool.install_namespaces(vm)
    vm.sh(f"echo {FIRST_PID - 1} > /proc/sys/kernel/ns_last_pid")
    launcher = [*UNLIMITED, pool.ENTER, *namespaces, "--"] if namespaces else []
    with vm.connect() as agent:
        agent.spawn([*launcher, PROGRAM, DIRECTORY, str(processes)])
    return [int(wait_for(vm, f"{DIRECTORY}/pid.{number}")) for number in range(processes)]


def outer(vm: lab.LabVm, pids: list[int]) -> list[int]:
    """Return the pids in the VM of processes that have `pids` in a namespace of their own."""
    text = vm.sh(
        f"for p in $(find /proc -maxdepth 2 -path '/proc/[0-9]*/exe' -lname {PROGRAM} "
        "-printf '%h\\n' 2>/dev/null); do grep -h ^NSpid: $p/status; done"
    ).stdout.decode()
    found = {int(inner): int(pid) for pid, inner in re.findall(r"NSpid:\t(\d+)\t(\d+)\n", text)}
    return [found[pid] for pid in pids]


def ask(vm: lab.LabVm, pids: list[int]) -> Answers:
    answers = []
    for number, pid in enumerate(pids):
        vm.sh(f"rm -f {DIRECTORY}/answer.{number}; kill -USR1 {pid}")
        answers.append(json.loads(wait_for(vm, f"{DIRECTORY}/answer.{number}")))
    return answers


def dump(vm: lab.LabVm, pid: int, path: Path) -> None:
    """Dump the tree, which ends it, and fetch the images."""
    done = vm.sh(f"criu dump -t {pid} -D {IMAGES} -v4 -o dump.log", timeout=120)
    assert done.status == 0, tail(vm, "dump.log")
    archive = path / "images.tar"
    vm.sh(f"tar cf {IMAGES}.tar -C {IMAGES} .")
    vm.get(f"{IMAGES}.tar", archive)
    run_tool(["tar", "xf", str(archive), "-C", str(path)])
    archive.unlink()


def restore_outside(
    vm: lab.LabVm, path: Path, outside: Sequence[str] = ("all",), criu_options: Sequence[str] = ()
) -> ovr.Report:
    with ovr.attach(f"lab:{vm.name}") as attached:
        return attached.restore(path, outside=outside, criu_options=criu_options)


def restore_neutral(vm: lab.LabVm, path: Path, outside: Sequence[str]) -> None:
    """CRIU alone, on the inside images."""
    vm.sh(f"rm -rf {IMAGES}; mkdir {IMAGES}")
    with ImageSet.open(path) as images, vm.connect() as agent:
        for name, content in build_inside(make_plan(images, outside), NO_POOL).images.items():
            local = path.parent / name
            local.write_bytes(b"".join(image_chunks(content)))
            agent.put(local, f"{IMAGES}/{name}")
            local.unlink()
        done = agent.run(["criu", "restore", "-d", "-D", IMAGES, "-v4", "-o", "restore.log"])
    assert done.status == 0, tail(vm, "restore.log")


def end(vm: lab.LabVm, pids: list[int]) -> None:
    """End the tree, and wait until all pids are free again."""
    numbers = " ".join(map(str, pids))
    gone = "while test -d /proc/$p; do sleep 0.05; done"
    vm.sh(f"kill -9 {numbers}; for p in {numbers}; do {gone}; done")


def tail(vm: lab.LabVm, log: str) -> str:
    return vm.sh(f"tail -n 25 {IMAGES}/{log}").stdout.decode(errors="replace")


def wait_for(vm: lab.LabVm, path: str) -> str:
    deadline = time.monotonic() + 30
    with vm.connect() as agent:
        while time.monotonic() < deadline:
            done = agent.run(["cat", path])
            if done.status == 0:
                return done.stdout.decode()
            time.sleep(0.05)
    raise AssertionError(f"no {path} in {vm.name}")
