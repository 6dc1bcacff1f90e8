"""Written content survives, though the guest swaps the pages out and in meanwhile."""

from collections.abc import Iterator

import pytest

import ovr
from ovr import lab
from ovr.lab import demo
from tests import subject
from tests.stress.copier import before_each_copy, ignoring_clean
from tests.stress.guest import trouble
from tests.vm.conftest import EVERYTHING, PREFIX

SIZE = 64 << 20
TRIES = 5  # the guest may make a clean page dirty again by itself
SWAP = "/usr/local/bin/ovr-swap"
SET_UP = {
    "file": """
        fallocate -l 256M /swap && chmod 600 /swap && mkswap -q /swap && swapon /swap
    """,
    "zram": """
        modprobe zram && echo 256M > /sys/block/zram0/disksize && mkswap -q /dev/zram0 &&
        swapon /dev/zram0
    """,
}
TAKE_DOWN = "swapoff -a; rm -f /swap; [ ! -e /sys/block/zram0 ] || echo 1 > /sys/block/zram0/reset"
# It reads pages in from swap, to put them together into huge ones.
KHUGEPAGED = """
    cd /sys/kernel/mm/transparent_hugepage && echo always > enabled && cd khugepaged &&
    echo 0 > scan_sleep_millisecs && echo 0 > alloc_sleep_millisecs && echo 511 > max_ptes_swap &&
    echo 8192 > pages_to_scan
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[tuple[lab.LabVm, subject.Images]]:
    path = tmp_path_factory.mktemp("images")
    with demo.lab_vm(f"{PREFIX}swap", memory="768M", share=path) as vm:
        subject.install(vm)
        vm.put(subject.build(subject.HERE.parent / "stress" / "swap.c"), SWAP, 0o755)
        pid = subject.start(vm, SIZE)
        subject.dump(vm, pid)
        subject.end(vm)
        subject.must(vm, KHUGEPAGED)
        yield vm, subject.Images(path, pid, SIZE)


# Under stress (test_under_fire.py) the guest has zram, too.
@pytest.fixture(params=SET_UP if EVERYTHING else ["file"])
def vm(request, place) -> Iterator[lab.LabVm]:
    vm, _ = place
    subject.must(vm, SET_UP[request.param])
    yield vm
    subject.end(vm)
    subject.must(vm, TAKE_DOWN)


def swapped_out(vm: lab.LabVm) -> int:
    counts = dict(map(str.split, subject.must(vm, "cat /proc/vmstat").splitlines()))
    return int(counts["pswpout"])


def restored(vm: lab.LabVm, images: subject.Images) -> subject.Answer:
    """Restore memory that was in swap and has been read before the copy; reclaim it afterwards."""
    read = []

    def squeeze() -> None:
        if not read:
            read.append(int(subject.must(vm, f"{SWAP} squeeze")))

    with before_each_copy(squeeze), ovr.attach(f"lab:{vm.name}") as attached:
        attached.restore(images.path, verify="full")
    assert read[0] > SIZE // 4096 / 2
    before = swapped_out(vm)
    subject.must(vm, f"{SWAP} out $(pgrep -x ovr-subject)")
    assert swapped_out(vm) > before
    return subject.ask(vm)


def test_what_is_written_survives_reclaim(vm, place):
    answer = restored(vm, place[1])
    assert answer == subject.Answer(subject.pages(SIZE), 0, "")
    assert not trouble(vm)


@pytest.mark.parametrize("vm", ["file"], indirect=True)
def test_the_tree_would_see_what_is_lost(vm, place):
    """The same with the check switched off: words are wrong, or it dies of a wrong pointer.

    With zram some kernels keep no copy of what they have read back.
    """
    assert any(loses_words(vm, place[1]) for _ in range(TRIES))


def loses_words(vm: lab.LabVm, images: subject.Images) -> bool:
    try:
        with ignoring_clean():
            return restored(vm, images).wrong > 0
    except AssertionError as error:
        return "has died" in str(error)
    finally:
        subject.end(vm)
