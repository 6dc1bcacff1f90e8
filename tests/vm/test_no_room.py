"""No room: disks that are full on the host and in the guest, a guest that is out of memory.

Each ends in one line with a cure, or does not matter; the tree is gone, and once there is room the
next restore is right.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ovr
from ovr.errors import AgentUnreachable, OvrError
from ovr.images import ImageSet, image_size
from ovr.lab.demo import answer_of
from ovr.plan import NO_POOL, build_inside, make_plan
from tests.vm.conftest import SIZE, UMASK, alive, end_workload
from tests.vm.test_failures import ovr_command, refused, unharmed

SMALL = "/sys/fs/cgroup/ovr-small"
PATIENCE = 60.0  # seconds


@pytest.fixture(params=("trixie",))
def suite(request):
    """Suites differ little in running out of space."""
    return request.param


def in_guest(vm, command: str) -> str:
    done = vm.sh(command, timeout=PATIENCE)
    assert done.status == 0, (command, done.stderr)
    return done.stdout.decode()


@contextmanager
def full_run(vm, left: int) -> Iterator[None]:
    """The file system of the agent's directory, with `left` KiB free."""
    size, used = map(int, in_guest(vm, "df --output=size,used -k /run | tail -n 1").split())
    in_guest(vm, f"mount -o remount,size={used + left}k /run")
    try:
        yield
    finally:
        in_guest(vm, f"mount -o remount,size={size}k /run")


def test_no_room_in_the_guest_for_image_files(vm, dump):
    with full_run(vm, 16):
        done = ovr_command("restore", "-D", dump.path, "--vm", f"lab:{vm.name}")
        refused(done, 1, "/run/ovr: No space left on device", "free memory or disk space")
        assert in_guest(vm, "ls /run/ovr") == "lock\n"
    unharmed(vm, dump)


def test_no_room_in_the_guest_for_what_criu_writes(vm, dump):
    """Its log is full: CRIU goes on without."""
    with full_run(vm, inside_size(dump) + 8), ovr.attach(f"lab:{vm.name}") as attached:
        try:
            attached.restore(dump.path, log_level=4)
        except OvrError as error:
            assert error.hint
            assert not alive(vm, dump.pid)
        else:
            assert answer_of(vm, dump.pid).wrong == 0
            end_workload(vm)
    unharmed(vm, dump)


def inside_size(dump) -> int:
    """KiB that the inside image set takes in the guest."""
    with ImageSet.open(dump.path) as images:
        inside = build_inside(make_plan(images), NO_POOL).images.values()
        return sum(-(-image_size(image) // 4096) * 4 for image in inside)


def test_no_room_on_the_host(vm, dump, tmp_path):
    """Log, pidfile, stats, cache and result: of these, only a pidfile is worth refusing."""
    full = tmp_path / "full"
    full.mkdir()
    mount(full, "8k")  # two pages: one for the filler, one for the pidfile
    try:
        (full / "filler").write_bytes(bytes(4096))
        done = restore_into(vm, dump, full)
        assert done.returncode == 0, done.stderr
        assert "cannot be written: No space left on device" in done.stderr
        assert "runs, but that cannot be printed" in done.stderr
        assert "Traceback" not in done.stderr
        assert (full / "pid").read_text() == str(dump.pid)
        answer = answer_of(vm, dump.pid)
        assert (answer.words, answer.wrong, int(answer.umask, 8)) == (SIZE // 8, 0, UMASK)
        end_workload(vm)
        (full / "pid").unlink()
        fill(full)
        done = restore_into(vm, dump, full)
        assert done.returncode == 2
        assert "pidfile" in done.stderr
        assert "No space left on device" in done.stderr
        assert not alive(vm, dump.pid)
    finally:
        subprocess.run(["umount", full], check=True)
    unharmed(vm, dump)


def mount(where: Path, size: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only who may mount file systems can have one that is full")


def fill(where: Path) -> None:
    try:
        with (where / "more").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        pass


def restore_into(vm, dump, work: Path) -> subprocess.CompletedProcess[str]:
    command = ["restore", "-D", dump.path, "--vm", f"lab:{vm.name}", "-W", work, "-v4"]
    command += ["-o", "log", "--pidfile", "pid", "--json"]
    script = f'XDG_CACHE_HOME={work} exec "$@" > /dev/full'
    return subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-m", "ovr", *map(str, command)],
        stderr=subprocess.PIPE, text=True, check=False, timeout=300,
    )  # fmt: skip


def refused_for_memory(vm, dump):
    try:
        done = ovr_command("restore", "-D", dump.path, "--vm", f"lab:{vm.name}")
        assert "memory" in refused_somehow(done)
    finally:
        answering(vm)


def test_guest_is_out_of_memory(vm, dump):
    """Less is free than the process takes: somebody is killed, and what is left is cleaned up."""
    available = int(in_guest(vm, "awk '/MemAvailable/ {print $2}' /proc/meminfo")) << 10
    hog = (available - SIZE // 2) >> 20
    # Memory that cannot be given back, and belongs to nobody whom one could kill.
    in_guest(vm, f"mount -o remount,size=90% /dev/shm; fallocate -l {hog}M /dev/shm/hog")
    try:
        refused_for_memory(vm, dump)
    finally:
        in_guest(vm, "rm -f /dev/shm/hog; mount -o remount,size=50% /dev/shm")
    gone(vm, dump)
    unharmed(vm, dump)


def test_a_cgroup_is_out_of_memory(vm, dump):
    """The agent, CRIU and all that they make may have less than the process takes."""
    half = SIZE // 2
    with vm.connect() as agent:
        pid = agent.hello.pid
    in_guest(
        vm, f"cd /sys/fs/cgroup && echo +memory > cgroup.subtree_control && mkdir -p {SMALL} &&"
        f" echo {half} > {SMALL}/memory.max && echo {pid} > {SMALL}/cgroup.procs"
    )  # fmt: skip
    try:
        refused_for_memory(vm, dump)
    finally:
        back = "while read p; do echo $p > /sys/fs/cgroup/cgroup.procs; done"
        in_guest(vm, f'procs=$(cat {SMALL}/cgroup.procs); echo "$procs" | {back}; true')
    gone(vm, dump)
    unharmed(vm, dump)


def refused_somehow(done) -> str:
    assert done.returncode in (1, 3), done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("ovr: ")
    assert "(" in line
    return line


def answering(vm) -> None:
    """Wait for the agent: it may have been among those that were killed."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if vm.sh("true").status == 0:
                return
        except AgentUnreachable:
            time.sleep(1)
    pytest.fail("the agent does not come back")


def gone(vm, dump) -> None:
    deadline = time.monotonic() + PATIENCE
    while alive(vm, dump.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert vm.sh("pgrep -x criu").status == 1
