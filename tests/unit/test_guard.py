"""Files that are cut off while they are mapped: an error, not the end of us."""

import errno
import mmap
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ovr._fastcopy import PAIR, RUN, RamMap, equal_pages
from ovr.errors import RamNotShared
from ovr.memory.addresses import PAGE_SIZE
from tests.sources import as_file

SIZE = 64 * PAGE_SIZE
CUT = 48 * PAGE_SIZE


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@pytest.fixture
def ram_file(tmp_path) -> Path:
    path = tmp_path / "ram"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def ram(ram_file):
    with ram_file.open("r+b") as file:
        ram = RamMap([(1 << 20, SIZE, file.fileno(), 0)], writable=True, unheld=True)
    yield ram
    ram.close()


@pytest.fixture
def pages(tmp_path) -> Path:
    path = tmp_path / "pages"
    path.write_bytes(bytes(SIZE))
    return path


def runs(offset: int = 0, size: int = SIZE) -> np.ndarray:
    return np.array([(0, (1 << 20) + offset, size, offset, 0, 12)], dtype=RUN)


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize(
    "touch",
    [
        lambda ram, step: ram.read((1 << 20) + CUT - 4, 8),
        lambda ram, step: ram.write((1 << 20) + CUT, b"12345678"),
        lambda ram, step: ram.find(1 << 20, (1 << 20) + SIZE, b"needle..", step),
        lambda ram, step: ram.translate((1 << 20) + CUT, 4, 0),
        lambda ram, step: ram.walk(
            (1 << 20) + CUT, 4, np.array([(0, PAGE_SIZE, 0)], dtype="<u8,<u8,<i8")
        ),
        lambda ram, step: ram.copy_in(runs(), *as_file(bytes(SIZE))),
        lambda ram, step: ram.first_difference(runs(), bytes(SIZE)),
    ],
    ids=["read", "write", "find", "translate", "walk", "copy_in", "first_difference"],
)
def test_a_ram_file_that_is_cut_off(ram, ram_file, touch, step):
    os.truncate(ram_file, CUT)
    for _ in range(2):
        with pytest.raises(RamNotShared, match=f"GPA {(1 << 20) + CUT:#x} is gone") as caught:
            touch(ram, step)
    assert caught.value.hint
    assert ram.read(1 << 20, 8) == bytes(8)


def test_a_source_that_is_cut_off(ram, pages):
    with mapped(pages) as source, pages.open("rb") as file:
        os.truncate(pages, CUT)
        ways = ((ram.copy_in, (file.fileno(), 0, SIZE)), (ram.first_difference, (source,)))
        for work, arguments in ways:
            with pytest.raises(OSError, match="cut off") as caught:
                work(runs(), *arguments)
            assert caught.value.errno == errno.EIO
            work(runs(0, CUT), *arguments)
            with pytest.raises(OSError, match="cut off"):
                work(runs(CUT, PAGE_SIZE), *arguments)
    ram.close()  # nobody counts as being inside of it


def test_pages_to_compare_that_are_cut_off(pages):
    pairs = np.array([(0, 0, SIZE)], dtype=PAIR)
    with mapped(pages) as source:
        os.truncate(pages, CUT)
        for pair in ((source, bytes(SIZE)), (bytes(SIZE), source)):
            with pytest.raises(OSError, match="cut off"):
                equal_pages(*pair, pairs)


def test_in_several_threads(ram, pages):
    """Those whose part is there are done; the others say so."""
    with mapped(pages) as source, pages.open("rb") as file, ThreadPoolExecutor(8) as pool:
        os.truncate(pages, CUT)
        ways = (
            (ram.copy_in, (file.fileno(), 0, SIZE), PAGE_SIZE),
            (ram.first_difference, (source,), None),
        )
        jobs = [
            (offset, pool.submit(work, runs(offset, PAGE_SIZE), *arguments), expected)
            for _ in range(20)
            for work, arguments, expected in ways
            for offset in range(0, SIZE, PAGE_SIZE)
        ]
        for offset, job, expected in jobs:
            if offset < CUT:
                assert job.result() == expected
            else:
                with pytest.raises(OSError, match="cut off"):
                    job.result()


ELSEWHERE = """
import faulthandler, mmap, os, sys
if sys.argv[2] == "before": faulthandler.enable()
from ovr._fastcopy import RamMap
with open(sys.argv[1], "r+b") as file:
    ram = RamMap([(0, os.fstat(file.fileno()).st_size, file.fileno(), 0)], writable=False)
    source = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
if sys.argv[2] == "after": faulthandler.enable()
if sys.argv[2] == "both": faulthandler.enable(); ram.find(0, 4096, b"x", 1); faulthandler.enable()
os.truncate(sys.argv[1], 4096)
print("so far", flush=True)
source[8192]
"""


@pytest.mark.parametrize("faulthandler", ["never", "before", "after", "both"])
def test_a_fault_that_is_not_ours(ram_file, faulthandler):
    """It ends the process as it would without us, and faulthandler still tells where."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(ram_file), faulthandler],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout == "so far\n"
    if "AddressSanitizer: BUS" in done.stderr:  # a build with sanitizers: it was here before us
        return
    assert done.returncode == -signal.SIGBUS
    assert ("Bus error" in done.stderr) == (faulthandler != "never")
