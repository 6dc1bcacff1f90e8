"""Pages that were copied while the tree ran are those that it has when it is stopped."""

import random
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ovr
from ovr import lab
from ovr.dump import AS_MANY_AS_HELP, DumpReport, copies, dump
from ovr.errors import VerifyMismatch
from ovr.lab import demo
from tests import subject
from tests.vm import churn
from tests.vm.conftest import EVERYTHING, PREFIX, contained_in
from tests.vm.test_swap import KHUGEPAGED, SET_UP

MOST_ROUNDS = 3
DUMPS = MOST_ROUNDS * (2 if EVERYTHING else 1)
TRIES = 5


@pytest.fixture(scope="module", params=("trixie",))
def vm(request, tmp_path_factory) -> Iterator[lab.LabVm]:
    share = tmp_path_factory.mktemp("share")
    with demo.lab_vm(
        f"{PREFIX}churn", suite=request.param, memory="768M", share=share, cpus=2
    ) as vm:
        churn.install(vm)
        subject.must(vm, SET_UP["zram"])
        subject.must(vm, KHUGEPAGED)
        yield vm


@pytest.fixture
def pid(vm, request) -> Iterator[int]:
    pid = churn.start(vm, seed=sum(request.node.name.encode()))
    yield pid
    churn.end(vm, pid)


def dumped(
    vm: lab.LabVm, pid: int, images: Path, *, leave_running: bool, rounds: int = AS_MANY_AS_HELP
) -> DumpReport:
    images.mkdir()
    with ovr.attach(f"lab:{vm.name}") as attached:
        return dump(
            attached, pid, images, pre_copies=rounds, leave_running=leave_running, verify="full"
        )


def test_images_are_what_the_tree_has(vm, pid, tmp_path):
    """Compared with all of its memory while it is stopped; it goes on as if nothing had been."""
    chance = random.Random(7)
    reports = []
    for number in range(DUMPS):
        time.sleep(chance.uniform(0, 1))
        rounds = 1 + number % MOST_ROUNDS
        reports.append(dumped(vm, pid, tmp_path / f"{number}", leave_running=True, rounds=rounds))
        assert len(reports[-1].rounds) == rounds + 1  # the last look is one, too
        answer = churn.ask(vm, pid)
        assert (answer.pages, answer.wrong) == (16384, 0)
    assert all(report.bytes_verified == report.bytes_total for report in reports)
    kept = [report.bytes_pre_copied / report.bytes_total for report in reports]
    assert max(kept) > 0.02, kept


def put_tree(vm: lab.LabVm, directory: Path, path: str) -> None:
    """Copy a directory of the host to the new directory `path` of the guest, with its links."""
    packed = directory.with_suffix(".tar")
    with tarfile.open(packed, "w") as tar:
        tar.add(directory, ".")
    vm.put(packed, "/root/images.tar", 0o600)
    subject.must(vm, f"rm -rf {path}; mkdir {path}; tar -C {path} -xf /root/images.tar")


@contained_in("test_dump.py::test_comes_back_by_criu_alone[trixie-cow-pre-copied]")
def test_criu_restores_them(vm, pid, tmp_path):
    """By itself, from the images and the subdirectories that they build on."""
    before = churn.ask(vm, pid)
    images = tmp_path / "images"
    report = dumped(vm, pid, images, leave_running=False, rounds=MOST_ROUNDS)
    assert report.bytes_pre_copied
    assert vm.sh(f"kill -0 {pid}").status
    put_tree(vm, images, "/root/images")
    subject.must(vm, "criu restore -d -D /root/images -v4 -o restore.log")
    after = churn.ask(vm, pid)
    assert (after.pages, after.wrong) == (16384, 0)
    assert after.steps > before.steps


def test_pages_written_meanwhile_would_be_missed(vm, pid, tmp_path, monkeypatch):
    """If it were not for the soft-dirty bits: that shows that the others can fail."""
    monkeypatch.setattr(copies, "SOFT_DIRTY", 0)
    with pytest.raises(VerifyMismatch):
        for number in range(TRIES):
            dumped(vm, pid, tmp_path / f"{number}", leave_running=True)
    assert churn.ask(vm, pid).wrong == 0
