"""The plan of an image with 100,000 pagemap entries, and the inside image set made from it."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from bench.conftest import SMOKE
from ovr.images import ImageSet
from ovr.images.framing import encode, image_bytes
from ovr.images.messages import MmEntry
from ovr.images.pagemap import PE_PRESENT, Pagemap, encode_pagemap
from ovr.images.vma import VMA_ANON_PRIVATE, is_private
from ovr.images.wire import copy_of
from ovr.plan import NO_POOL, build_inside, make_plan

DUMP = Path(__file__).parent.parent / "tests" / "unit" / "images" / "data" / "trixie.tar.xz"
ENTRIES = 100_000
PLACE = 0x1000_0000_0000
"""Where no area of the dump is."""
LIMIT = 0.5


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A real dump of one process, with one more area of which every second page was there."""
    where = tmp_path_factory.mktemp("many")
    with tarfile.open(DUMP) as archive:
        archive.extractall(where, filter="data")
    images = where / "one"
    with ImageSet.open(images) as image_set:
        task = image_set.tasks[0]
        (mm,) = image_set.entries(f"mm-{task.pid}.img", MmEntry)
        mm, pagemap = copy_of(mm), task.memory
        private = (task.vmas["status"] & VMA_ANON_PRIVATE != 0) & is_private(task.vmas)
        pattern = copy_of(mm.vmas[int(private.argmax())])
        pages = task.memory.pages_name
    pattern.start, pattern.end = PLACE, PLACE + 2 * ENTRIES * 4096
    mm.vmas.insert(sum(vma.start < PLACE for vma in mm.vmas), pattern)
    more = np.zeros(ENTRIES, pagemap.entries.dtype)
    more["gva"] = PLACE + 8192 * np.arange(ENTRIES, dtype="<u8")
    more["size"], more["flags"] = 4096, PE_PRESENT
    entries = np.sort(np.concatenate([pagemap.entries, more]), order="gva")
    name = f"pagemap-{task.pid}.img"
    changed = Pagemap(pagemap.pages_id, entries, pagemap.compat)
    (images / name).write_bytes(encode_pagemap(changed, name))
    mm_name = f"mm-{task.pid}.img"
    (images / mm_name).write_bytes(image_bytes(mm_name, [encode(mm)]))
    with (images / pages).open("r+b") as file:
        file.truncate(int(entries["size"].sum()))
    yield images
    shutil.rmtree(where)


@pytest.mark.benchmark(group="plan: 100,000 pagemap entries")
def test_plan(many, benchmark, results, judge):
    def plan():
        with ImageSet.open(many) as image_set:
            made = make_plan(image_set)
            build_inside(made, NO_POOL)
            assert sum(len(task.runs) for task in made.tasks) >= ENTRIES

    benchmark.pedantic(plan, rounds=1 if SMOKE else 10, warmup_rounds=0 if SMOKE else 1)
    if benchmark.stats is not None:
        results.put("plan.100000", list(benchmark.stats.stats.data))
    judge(benchmark, LIMIT)
