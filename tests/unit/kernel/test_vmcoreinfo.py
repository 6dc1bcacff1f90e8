"""VMCOREINFO texts, whole and not."""

import pytest

from ovr.kernel.find.vmcoreinfo import candidates, parse
from ovr.memory.addresses import PAGE_SIZE, Gpa

from ..machine import Machine
from .writers import vmcoreinfo_text

SYMBOLS = {
    "init_uts_ns": 0xFFFF_FFFF_ADC2_19C0,
    "swapper_pg_dir": 0xFFFF_FFFF_ADA2_2000,
    "_stext": 0xFFFF_FFFF_ABE0_0000,
}


def test_what_it_says():
    text = vmcoreinfo_text(
        SYMBOLS, phys_base="NUMBER(phys_base)=-857735168", l5="NUMBER(pgtable_l5_enabled)=1"
    )
    info = parse(Gpa(0x1000), text)
    assert info is not None
    assert info.release == "6.12.0-toy"
    assert info.build_id == "0123456789abcdef0123456789abcdef01234567"
    assert info.levels == 5
    assert info.numbers["phys_base"] == -857735168
    assert info.symbols["_stext"] == 0xFFFF_FFFF_ABE0_0000
    assert info.page_table == 0x2DA2_2000 - 857735168
    assert info.offsets == {"uts_namespace.name": 0}


def test_four_levels_and_no_build_id():
    info = parse(Gpa(0), vmcoreinfo_text(SYMBOLS, BUILD_ID=None))
    assert info is not None
    assert (info.levels, info.build_id) == (4, "")


@pytest.mark.parametrize(
    "key",
    [
        "PAGESIZE",
        "uts_name",
        "phys_base",
        "l5",
        "_stext",
        "swapper_pg_dir",
        "init_uts_ns",
        "image_size",
    ],
)
def test_a_text_that_lacks_something_is_none(key):
    assert parse(Gpa(0), vmcoreinfo_text(SYMBOLS, **{key: None})) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"OSRELEASE=%s\n",
        b"PAGESIZE=4096\n" + vmcoreinfo_text(SYMBOLS),
        vmcoreinfo_text(SYMBOLS, PAGESIZE="PAGESIZE=16384"),
        vmcoreinfo_text(SYMBOLS, phys_base="NUMBER(phys_base)=%ld"),
        vmcoreinfo_text(SYMBOLS, _stext="SYMBOL(_stext)=zz"),
        vmcoreinfo_text(SYMBOLS, _stext="SYMBOL(_stext)=1000"),
        vmcoreinfo_text(SYMBOLS, image_size="NUMBER(KERNEL_IMAGE_SIZE)=1073741825"),
        vmcoreinfo_text(SYMBOLS, image_size="NUMBER(KERNEL_IMAGE_SIZE)=4398046511104"),
        vmcoreinfo_text(SYMBOLS) + b"\xff\xfe\n",
        vmcoreinfo_text(SYMBOLS) + b"no line\n",
    ],
)
def test_other_texts_are_none(text):
    assert parse(Gpa(0), text) is None


def test_candidates_in_ram(tmp_path):
    machine = Machine.build(tmp_path)
    good = vmcoreinfo_text(SYMBOLS)
    filler = "".join(f"LENGTH(filler{n})={n}\n" for n in range(300)).encode()
    put = {
        0x10_0000: b"OSRELEASE=%s\n",
        0x10_5000: good + b"\0",
        0x10_7010: good + b"\0",  # not at the start of a page: the ELF note's copy
        0x10_9000: good + filler + b"\0",  # more than one page
        (8 << 20) - PAGE_SIZE: (good + filler)[:PAGE_SIZE],  # RAM ends before the text does
    }
    for gpa, data in put.items():
        machine.ram.write(Gpa(gpa), data)
    found = list(candidates(machine.ram))
    assert [info.gpa for info in found] == [0x10_5000, 0x10_9000]
    assert found[1].text == good + filler
