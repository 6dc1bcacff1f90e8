"""Dumps of lab VMs from outside, and of CRIU inside the same tree while it stands still."""

import shlex
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import ovr
from ovr import lab
from ovr.dump import DumpReport, dump
from tests.vm.comparison import differences
from tests.vm.services.base import run

__all__ = ["dump_outside", "unlike_criu"]

_CGROUP: Final = "/sys/fs/cgroup"
_STILL: Final = f"{_CGROUP}/still"
_REFERENCE: Final = "/var/tmp/reference"
_PATIENCE: Final = 600.0  # seconds


def dump_outside(
    vm: lab.LabVm,
    pid: int,
    images: Path,
    criu_options: Sequence[str] = (),
    *,
    leave_running: bool = False,
    pre_copies: int = 0,
) -> DumpReport:
    """Dump a tree of the guest by ``ovr dump`` into the new directory `images`; verify it all.

    Raises:
        OvrError: as for `ovr.dump.dump`.
    """
    images.mkdir()
    with ovr.attach(f"lab:{vm.name}") as attached:
        return dump(
            attached, pid, images, verify="full", leave_running=leave_running,
            pre_copies=pre_copies, criu_options=criu_options,
        )  # fmt: skip


def unlike_criu(
    vm: lab.LabVm, pid: int, pids: Iterable[int], scratch: Path, criu_options: Sequence[str] = ()
) -> list[str]:
    """Dump a tree by the guest's CRIU and from outside; return how the images differ.

    Args:
        vm: the VM.
        pid: the root task; the tree runs on afterwards.
        pids: its processes.
        scratch: a new directory for the images.
        criu_options: for ``criu dump``, besides the usual.

    Raises:
        OvrError: as for `ovr.dump.dump`.
        AssertionError: the guest's CRIU cannot dump it.
    """
    scratch.mkdir()
    archive = f"{_REFERENCE}.tar"
    with _still(vm, pids) as freeze:
        options = [*criu_options, *freeze]
        # The first dump by CRIU is not the last one's equal: it moves threads out of rseq sections
        # and joins areas that it has read from.
        for _ in range(2):
            command = f"criu dump -R -t {pid} -D {_REFERENCE} -v2 -o dump.log {shlex.join(options)}"
            run(vm, f"rm -rf {_REFERENCE}; mkdir -m 700 {_REFERENCE} && {{ {command} ||"
                    f" ! tail -n 20 {_REFERENCE}/dump.log >&2; }}", timeout=_PATIENCE)  # fmt: skip
        dump_outside(vm, pid, scratch / "outside", options, leave_running=True)
    run(vm, f"tar -C {_REFERENCE} -cf {archive} . && rm -r {_REFERENCE}", timeout=_PATIENCE)
    vm.get(archive, scratch / "inside.tar")
    run(vm, f"rm {archive}")
    inside = scratch / "inside"
    inside.mkdir()
    with tarfile.open(scratch / "inside.tar") as tar:
        tar.extractall(inside, filter="data")
    return differences(inside, scratch / "outside")


@contextmanager
def _still(vm: lab.LabVm, pids: Iterable[int]) -> Iterator[Sequence[str]]:
    """Freeze processes in a cgroup of their own; yields what CRIU needs to dump them there.

    CRIU freezes them again before it lets go of them, so they do not run an instruction in between.
    """
    all_pids = " ".join(map(str, pids))
    move = "while read pid cgroup; do echo $pid > $cgroup/cgroup.procs; done < /run/still"
    run(vm, f"""
        set -e; mkdir -p {_STILL}
        for p in {all_pids}; do
            echo $p {_CGROUP}$(sed -n s/^0:://p /proc/$p/cgroup)
        done > /run/still
        for p in {all_pids}; do echo $p > {_STILL}/cgroup.procs; done
        echo 1 > {_STILL}/cgroup.freeze
        for i in $(seq 300); do grep -qx 'frozen 1' {_STILL}/cgroup.events && exit; sleep 0.1; done
        exit 1
    """, timeout=_PATIENCE)  # fmt: skip
    try:
        yield "--freeze-cgroup", _STILL
        run(vm, f"grep -qx 'frozen 1' {_STILL}/cgroup.events")
    finally:
        run(vm, f"echo 0 > {_STILL}/cgroup.freeze; {move}; rmdir {_STILL}")
