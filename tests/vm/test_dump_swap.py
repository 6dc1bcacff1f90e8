"""Dumped from outside while the guest writes the tree's memory to swap."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ovr import lab
from ovr.attempt.saver import Saver
from ovr.dump import AS_MANY_AS_HELP
from ovr.lab import demo
from ovr.lab.share import SHARE
from tests import subject
from tests.stress.guest import trouble
from tests.vm.conftest import EVERYTHING, PREFIX
from tests.vm.dumping import dump_outside
from tests.vm.test_swap import SET_UP, SIZE, SWAP

OUTS = 4  # first holds, before each of which the memory is written to swap
pytestmark = pytest.mark.skipif(not EVERYTHING, reason="only with OVR_ALL=1")


@pytest.fixture(scope="module")
def share(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("images")
    return path


@pytest.fixture(scope="module")
def vm(share) -> Iterator[lab.LabVm]:
    with demo.lab_vm(f"{PREFIX}dump-swap", memory="768M", share=share) as vm:
        subject.install(vm)
        vm.put(subject.build(subject.HERE.parent / "stress" / "swap.c"), SWAP, 0o755)
        subject.must(vm, SET_UP["file"])
        yield vm


def in_swap(vm: lab.LabVm) -> int:
    """Return how many bytes of the tree are in swap."""
    show = "for p in $(pgrep -x ovr-subject); do grep VmSwap /proc/$p/status; done"
    return sum(int(line.split()[1]) << 10 for line in subject.must(vm, show).splitlines())


@pytest.mark.parametrize("pre_copies", [0, AS_MANY_AS_HELP], ids=["stopped", "pre-copied"])
def test_pages_in_swap_are_read(vm, share, pre_copies, monkeypatch):
    """They are in swap when the dump begins, and again when it has had them read once."""
    images = share / str(pre_copies)
    real, outs = Saver._held, []

    def out() -> None:
        subject.must(vm, f"{SWAP} out $(pgrep -x ovr-subject)")
        outs.append(in_swap(vm))

    def out_first(*args, **kwargs):
        if len(outs) < 1 + OUTS:
            out()
        return real(*args, **kwargs)

    monkeypatch.setattr(Saver, "_held", out_first)
    pid = subject.start(vm, SIZE)
    out()
    try:
        dump_outside(vm, pid, images, pre_copies=pre_copies)
        assert len(outs) == 1 + OUTS
        assert min(outs) > SIZE / 2
        subject.must(vm, f"criu restore -d -D {SHARE}/{images.name} -o restore.log", timeout=600)
        assert subject.ask(vm) == subject.Answer(subject.pages(SIZE), 0, "")
    finally:
        subject.end(vm)
    assert not trouble(vm)
