"""Pages that a dump reads last, since the kernel writes the CPU's number there."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from ovr.dump.output import NewImages
from ovr.dump.rseq import rseq_pages
from ovr.images import ImageSet
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.ranges import common, join

DATA = Path(__file__).parent / "images" / "data"


@pytest.fixture(params=["bookworm", "trixie", "forky"])
def recorded(request, tmp_path) -> Path:
    with tarfile.open(DATA / f"{request.param}.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.parametrize("name", ["one", "tree"])
def test_the_pages_of_all_threads(recorded, name):
    """Three threads; a child and a zombie."""
    with ImageSet.open(recorded / name) as images:
        found = rseq_pages(images.names, NewImages(recorded / name))
        assert {*found} == {task.pid for task in images.tasks}
        for task in images.tasks:
            wanted, pages = task.rseq_areas if task.alive else join(), found[task.pid]
            assert np.array_equal(common(pages, wanted), wanted)
            assert not (pages["start"] % PAGE_SIZE).any()
            assert not (pages["end"] % PAGE_SIZE).any()
            assert (pages["end"] - pages["start"]).sum() <= len(task.threads) * PAGE_SIZE
        assert len(found[images.tasks[0].pid])
