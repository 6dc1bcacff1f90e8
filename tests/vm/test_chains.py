"""Chains of dumps: the last one says what has changed, the rest is in those before it."""

import os
from pathlib import Path

import numpy as np
import pytest

import ovr
from ovr.errors import ImagesDamaged
from ovr.images import ImageSet
from ovr.images.pagemap import PE_LAZY, decode_pagemap
from ovr.lab import demo
from ovr.lab.share import SHARE
from ovr.plan import make_plan
from tests.vm import pool
from tests.vm.conftest import EVERYTHING, PREFIX, SUITES

PROGRAM = pool.BY_NAME["private"]
WORK = "/var/tmp/chain"
DEDUPLICATE = {"as-dumped": "true", "deduplicated": f"criu dedup -D {WORK}/3"}


@pytest.fixture(scope="module", params=SUITES if EVERYTHING else ("bookworm",))
def suite(request) -> str:
    """By default bookworm: the oldest kernel and CRIU, in no other restore that verifies memory."""
    return request.param


@pytest.fixture(scope="module")
def chains(suite, tmp_path_factory) -> Path:
    """Three dumps, each after the process has worked on; as CRIU wrote them, and deduplicated."""
    share = tmp_path_factory.mktemp(f"chains-{suite}")
    with demo.lab_vm(f"{PREFIX}chain", suite=suite, memory="1G", share=share) as vm:
        pool.install(vm, PROGRAM)
        pid = pool.start(vm, PROGRAM)
        for number, verb in ((1, "pre-dump"), (2, "pre-dump"), (3, "dump")):
            before = f"--prev-images-dir ../{number - 1}" if number > 1 else ""
            command = f"criu {verb} -t {pid} --track-mem {before} -D {WORK}/{number} -o log"
            done = vm.sh(f"mkdir -p {WORK}/{number} && {command}", timeout=300)
            assert done.status == 0, vm.sh(f"tail {WORK}/{number}/log").stdout.decode()
            if verb == "pre-dump":
                assert pool.ask(vm, PROGRAM)["ok"]
        for name, command in DEDUPLICATE.items():
            done = vm.sh(f"{command} && cp -a --sparse=always {WORK} {SHARE}/{name}", timeout=300)
            assert done.status == 0, done.stderr.decode()
    return share


def size_on_disk(path: Path) -> int:
    return sum(image.stat().st_blocks for image in path.rglob("pages-*.img"))


@pytest.mark.parametrize("how", DEDUPLICATE)
def test_comes_back(suite, chains, pool_vm, how):
    images = chains / how / "3"
    with ImageSet.open(images) as opened:
        [task] = make_plan(opened).tasks
        levels = {level: len(pieces) for level, pieces in task.pieces.items()}
        assert levels.keys() == {0, 1, 2}, levels
        name = f"pagemap-{task.task.pid}.img"
        flags = decode_pagemap((images / name).read_bytes(), name).entries["flags"]
        assert np.any(flags & PE_LAZY)  # CRIU marks what could be restored lazily in every dump
    with ovr.attach(f"lab:{pool_vm.name}") as vm:
        report = vm.restore(images, verify="full")
    assert report.bytes_outside / report.bytes_total >= 0.99
    answer = pool.ask(pool_vm, PROGRAM)
    assert answer["ok"], answer["wrong"]


def test_deduplicated_images_are_smaller(chains):
    sizes = [size_on_disk(chains / how) for how in DEDUPLICATE]
    assert sizes[1] < sizes[0]


@pytest.fixture
def pool_vm(suite, request):
    vm = request.getfixturevalue("pool").get(suite)
    pool.install(vm, PROGRAM)
    yield vm
    pool.end(vm, PROGRAM)


def test_a_parent_that_is_missing(suite, chains, pool_vm, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for image in (chains / "as-dumped" / "3").glob("*.img"):
        os.link(image, copy / image.name)
    with (
        pytest.raises(ImagesDamaged, match="parent images"),
        ovr.attach(f"lab:{pool_vm.name}") as vm,
    ):
        vm.restore(copy)
