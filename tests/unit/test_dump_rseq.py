"""Pages that a dump reads last, since the kernel writes the CPU's number there."""

import numpy as np
import pytest

from ovr.dump.output import NewImages
from ovr.dump.rseq import rseq_pages
from ovr.images import ImageSet
from ovr.memory.addresses import PAGE_SIZE
from ovr.memory.ranges import common, join


@pytest.mark.parametrize("name", ["one", "tree"])
def test_the_pages_of_all_threads(dumps, name):
    """Three threads; a child and a zombie."""
    with ImageSet.open(dumps / name) as images:
        found = rseq_pages(images.names, NewImages(dumps / name))
        assert {*found} == {task.pid for task in images.tasks}
        for task in images.tasks:
            wanted, pages = task.rseq_areas if task.alive else join(), found[task.pid]
            assert np.array_equal(common(pages, wanted), wanted)
            assert not (pages["start"] % PAGE_SIZE).any()
            assert not (pages["end"] % PAGE_SIZE).any()
            assert (pages["end"] - pages["start"]).sum() <= len(task.threads) * PAGE_SIZE
        assert len(found[images.tasks[0].pid])
