"""Pages that were copied while the tree ran are those that it has when it is stopped."""

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ovr
from ovr import lab
from ovr.dump import DumpReport, dump, precopy
from ovr.errors import VerifyMismatch
from ovr.images.pagemap import PE_PARENT
from ovr.lab import demo
from tests import subject
from tests.vm import churn
from tests.vm.conftest import PREFIX
from tests.vm.test_swap import KHUGEPAGED, SET_UP

DUMPS = 6
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


def dumped(vm: lab.LabVm, pid: int, images: Path, *, leave_running: bool) -> DumpReport:
    images.mkdir()
    with ovr.attach(f"lab:{vm.name}") as attached:
        return dump(
            attached, pid, images, pre_copies=True, leave_running=leave_running, verify="full"
        )


def test_images_are_what_the_tree_has(vm, pid, tmp_path):
    """Compared with all of its memory while it is stopped; it goes on as if nothing had been."""
    chance = random.Random(7)
    reports = []
    for number in range(DUMPS):
        time.sleep(chance.uniform(0, 1))
        reports.append(dumped(vm, pid, tmp_path / f"{number}", leave_running=True))
        answer = churn.ask(vm, pid)
        assert (answer.pages, answer.wrong) == (16384, 0)
    assert all(report.bytes_verified == report.bytes_total for report in reports)
    kept = [report.bytes_pre_copied / report.bytes_total for report in reports]
    assert max(kept) > 0.02, kept


def test_criu_restores_them(vm, pid, tmp_path):
    """By itself, from the images and the subdirectory that they build on."""
    before = churn.ask(vm, pid)
    images = tmp_path / "images"
    report = dumped(vm, pid, images, leave_running=False)
    assert report.bytes_pre_copied
    assert vm.sh(f"kill -0 {pid}").status
    vm.sh("rm -rf /root/images; mkdir -p /root/images/pre-copy; ln -s pre-copy /root/images/parent")
    for file in images.rglob("*.img"):
        vm.put(file, f"/root/images/{file.relative_to(images)}", 0o600)
    subject.must(vm, "criu restore -d -D /root/images -v4 -o restore.log")
    after = churn.ask(vm, pid)
    assert (after.pages, after.wrong) == (16384, 0)
    assert after.steps > before.steps


def test_pages_written_meanwhile_would_be_missed(vm, pid, tmp_path, monkeypatch):
    """If it were not for the soft-dirty bits: that shows that the others can fail."""
    usual = precopy.Copies.check_unchanged

    def blind(self, dumped, late, guest, holder):
        entries = dumped.pagemap.entries.copy()
        entries["flags"] = np.uint32(PE_PARENT)
        all_clean = replace(dumped, pagemap=replace(dumped.pagemap, entries=entries))
        return usual(self, all_clean, late, guest, holder)

    monkeypatch.setattr(precopy.Copies, "check_unchanged", blind)
    with pytest.raises(VerifyMismatch):
        for number in range(TRIES):
            dumped(vm, pid, tmp_path / f"{number}", leave_running=True)
    assert churn.ask(vm, pid).wrong == 0
