"""--vmlinux: symbols and types from a file, and files that are none or another kernel's."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovr.errors import KernelNotFound, OvrError, UsageError
from ovr.kernel import Kernel, processes
from ovr.kernel.find.vmlinux import Vmlinux
from ovr.memory.addresses import Gpa

from ..machine import Machine
from .toy import ToyKernel, toy_btf
from .writers import elf

SLIDE = 0x1A00_0000
LINKED = 0xFFFF_FFFF_8100_0000
ID = bytes(range(20))
ID_AT = 0x6000
HIDDEN = {f"kallsyms_{name}": None for name in ("names", "num_syms", "token_table", "token_index")}


@pytest.fixture
def toy(tmp_path):
    """A kernel that KASLR moved, without kallsyms (in VMCOREINFO) and BTF."""
    return with_id(
        ToyKernel(
            Machine.build(tmp_path), base=LINKED + SLIDE, without=frozenset({"__start_BTF"}),
            note_lines={"offset": f"KERNELOFFSET={SLIDE:x}", **HIDDEN},
        )
    )  # fmt: skip


def with_id(toy):
    toy.poke(toy.base + ID_AT, "20s", ID)
    return toy


def linked(toy):
    listed = {name: at for name, at in toy.symbols.items() if name not in toy.without}
    return [(name, at - SLIDE if at > LINKED else at) for name, at in listed.items()]


def vmlinux(path, toy, *, symbols=True, btf=True, build_id=(LINKED + ID_AT, ID)):
    sections = {".text": (LINKED, b"\x90" * 64)}
    if btf:
        sections[".BTF"] = (0, toy_btf())
    path.write_bytes(elf(sections, linked(toy) if symbols else [], build_id))
    return path


def test_a_kernel_without_symbols_and_types(toy, tmp_path):
    with pytest.raises(KernelNotFound, match="symbol table") as caught:
        Kernel.find(toy.machine.ram)
    assert "--vmlinux" in caught.value.hint
    kernel = Kernel.find(toy.machine.ram, vmlinux(tmp_path / "vmlinux", toy))
    assert [process.comm for process in processes(kernel)] == ["init"]
    assert dict(kernel.symbols) == {
        name: at for name, at in toy.symbols.items() if name not in toy.without
    }
    assert kernel.symbols.get("cpu_counter") == 0x10  # a per-cpu offset: KASLR does not move it
    assert kernel.symbols.get("file.c") is None
    assert kernel.same_boot()


def test_each_part_is_taken_from_where_it_is(tmp_path):
    toy = with_id(
        ToyKernel(
            Machine.build(tmp_path), base=LINKED + SLIDE,
            note_lines={"offset": f"KERNELOFFSET={SLIDE:x}"},
        )
    )  # fmt: skip
    for parts in ({"symbols": False}, {"btf": False}):
        kernel = Kernel.find(toy.machine.ram, str(vmlinux(tmp_path / "vmlinux", toy, **parts)))
        assert [process.comm for process in processes(kernel)] == ["init"]


def test_types_that_neither_has(toy, tmp_path):
    with pytest.raises(KernelNotFound, match="does not describe its types") as caught:
        Kernel.find(toy.machine.ram, vmlinux(tmp_path / "vmlinux", toy, btf=False))
    assert "--vmlinux" in caught.value.hint
    assert "pahole -J" in caught.value.hint


@pytest.mark.parametrize(
    "build_id",
    [(LINKED + ID_AT, ID[::-1]), (LINKED + ID_AT + 8, ID), (0x1000, ID), ((1 << 64) - 40, ID)],
)
def test_another_kernels_file(toy, tmp_path, build_id):
    with pytest.raises(KernelNotFound, match="of another kernel") as caught:
        Kernel.find(toy.machine.ram, vmlinux(tmp_path / "vmlinux", toy, build_id=build_id))
    assert "6.12.0-toy" in str(caught.value)


@pytest.mark.parametrize("offset", ["zzz", "-1a000000", "0", "1a000000000", ""])
def test_an_offset_that_is_a_lie(toy, tmp_path, offset):
    text = toy.machine.ram.read(Gpa(toy.note), 4096)
    changed = text.replace(b"KERNELOFFSET=1a000000", b"KERNELOFFSET=" + offset.encode())
    toy.machine.ram.write(Gpa(toy.note), changed)
    with pytest.raises(KernelNotFound, match="of another kernel"):
        Kernel.find(toy.machine.ram, vmlinux(tmp_path / "vmlinux", toy))


def test_files_that_are_no_vmlinux(toy, tmp_path):
    path = tmp_path / "vmlinux"
    whole = vmlinux(path, toy).read_bytes()
    for content, message in (
        (b"", "no usable ELF file"),
        (b"MZ" + bytes(5000), "no usable ELF file"),
        (whole[:300], "no usable ELF file"),
        (whole.replace(b"GNU\0", b"GNU!"), "no usable ELF file"),
        (whole[:18] + b"\xb7" + whole[19:], "for AArch64"),
        (vmlinux(path, toy, build_id=None).read_bytes(), "without a build id"),
        (
            vmlinux(path, toy, symbols=False, btf=False).read_bytes(),
            r"without \.symtab and \.BTF",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message) as caught:
            Vmlinux.open(path)
        assert "extract-vmlinux" in caught.value.hint
    with pytest.raises(UsageError, match="No such file"):
        Vmlinux.open(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="Is a directory"):
        Vmlinux.open(tmp_path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damage_ends_in_no_other_error(toy, tmp_path, data):
    path = tmp_path / "damaged"
    content = bytearray(vmlinux(path, toy).read_bytes())
    headers = len(content) - 64 * 7  # most of what can go wrong is here
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 63) | st.integers(headers, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = Vmlinux.open(path)
        found.symbols(SLIDE)
    except OvrError:
        pass
