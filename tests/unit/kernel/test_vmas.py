"""The mappings of a process, as a hostile guest may have them."""

from types import SimpleNamespace

import pytest

from ovr.errors import GuestFault
from ovr.kernel.linux import mm as mm_module
from ovr.kernel.linux.mm import for_each_vma


def found(monkeypatch, low, high, start, end):
    vma = SimpleNamespace(vm_start=start, vm_end=end)
    types = SimpleNamespace(pointer=lambda name, space, entry: vma)
    monkeypatch.setattr(mm_module, "mt_for_each", lambda tree, first, last: [(low, high, 0x1000)])
    return [*for_each_vma(SimpleNamespace(mm_mt=None, types_=types, space_=None))]


def test_whole_pages(monkeypatch):
    assert len(found(monkeypatch, 0x2000, 0x4FFF, 0x2000, 0x5000)) == 1


@pytest.mark.parametrize(
    ("low", "high", "start", "end"),
    [
        (0x2000, 0x4FFF, 0x2000, 0x6000),  # not the one for these addresses
        (0x2001, 0x4FFF, 0x2001, 0x5000),  # parts of pages
        (0x2000, 0x4FFE, 0x2000, 0x4FFF),
        (0x2000, 0x2000, 0x2000, 0x2001),
    ],
)
def test_areas_that_cannot_be(monkeypatch, low, high, start, end):
    with pytest.raises(GuestFault):
        found(monkeypatch, low, high, start, end)
