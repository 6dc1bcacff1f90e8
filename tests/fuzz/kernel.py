"""Targets: what a guest's kernel says of itself, in its memory and in its vmlinux."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ovr.kernel.find.kallsyms import read_kallsyms
from ovr.kernel.find.vmcoreinfo import START_KERNEL_MAP, parse
from ovr.kernel.find.vmlinux import Vmlinux
from ovr.kernel.types.btf import Btf
from ovr.kernel.types.types import Types
from ovr.memory.addresses import Gpa, Gva
from tests.fuzz.patches import patched, sample_patches
from tests.fuzz.target import Input, Target
from tests.unit.kernel.toy import toy_btf
from tests.unit.kernel.writers import ENCODINGS, KallsymsWriter, Memory, elf, vmcoreinfo_text

__all__ = ["TARGETS"]

BASE = 0xFFFF_FFFF_8100_0000
SYMBOLS = [("_stext", BASE), ("init_task", BASE + 0x1000), ("static_key", BASE + 0x2000)]
SYMBOLS += [("long_name" * 20, BASE + 0x3000)]
PER_CPU = [("cpu_counter", 0x10)]
BUILD_ID = bytes(range(20))
REQUIRED = {
    "_stext": BASE,
    "init_uts_ns": BASE + 0x1000,
    "swapper_pg_dir": START_KERNEL_MAP + 0x1000,
}


@cache
def scratch() -> Path:
    """A directory of this process's own, in memory where that can be."""
    place = Path(tempfile.mkdtemp(prefix="ovr-fuzz-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


# ---- BTF ---------------------------------------------------------------------------------


def use_types(data: bytes) -> None:
    """Look at every type in a .BTF section, as the view would."""
    found = Btf(data)
    types = Types(found)
    for number in range(min(len(found), 512)):
        kind = found.type(number)
        found.resolve(number)
        found.sizeof(number)
        types._codec(number)
        name = getattr(kind, "name", "")
        list(found.find(name, *range(20)))
        if type(kind).__name__ == "Composite":
            types.fields(number)
            types.make_class(number)
    types.variable("cpu_counter")
    for name in ("struct task_struct", "pgd_t", "enum maple_type", "unsigned long **"):
        if name in types:
            types.sizeof(name)
            types.codec(name)
    types.offsetof("struct task_struct", "pid_links[1].next")


def btf_seeds() -> Iterator[bytes]:
    yield toy_btf()
    yield toy_btf(tk_data=True)


# ---- kallsyms ----------------------------------------------------------------------------


@cache
def tables() -> list[list[bytes]]:
    made = []
    for encoding in ENCODINGS:
        symbols = PER_CPU + SYMBOLS if encoding.startswith("absolute") else SYMBOLS
        table, where = KallsymsWriter(symbols, encoding).build(BASE)
        text = vmcoreinfo_text(where | REQUIRED)
        made.append([table, text])
    return made


def kallsyms(data: bytes) -> None:
    source = Input(data)
    table, text = patched(tables()[source.number() % len(ENCODINGS)], source)
    memory = Memory(BASE, max(len(table), 1 << 14))
    memory.data[: len(table)] = table
    info = parse(Gpa(0), text)
    if info is None:
        return
    symbols = read_kallsyms(memory, info)
    assert symbols.get("_stext") is not None
    assert len(list(symbols)) == len(symbols)


def kallsyms_seeds() -> Iterator[bytes]:
    for number, parts in enumerate(tables()):
        for sample in sample_patches(parts):
            yield bytes([number]) + sample


# ---- VMCOREINFO --------------------------------------------------------------------------


def vmcoreinfo(data: bytes) -> None:
    info = parse(Gpa(4096), data)
    if info is not None:
        assert info.levels in (4, 5)
        info.release, info.build_id, info.page_table  # noqa: B018 - may they be asked for?


def vmcoreinfo_seeds() -> Iterator[bytes]:
    for _, text in tables():
        yield text


# ---- vmlinux -----------------------------------------------------------------------------


class Image:
    """The input of slide(): a kernel that claims to be the file's."""

    def read(self, gva: Gva, size: int) -> bytes:
        return BUILD_ID[:size]


def vmlinux(data: bytes) -> None:
    path = scratch() / "vmlinux"
    path.write_bytes(data)
    file = Vmlinux.open(path)
    info = parse(Gpa(0), vmcoreinfo_text(REQUIRED))
    assert info is not None
    symbols = file.symbols(0x2AE00000)
    if symbols is not None:
        symbols.get("_stext")
        list(symbols)
    file.slide(Image(), info)  # type: ignore[arg-type]
    if file.btf is not None:
        Btf(file.btf)


@cache
def files() -> list[bytes]:
    symbols = [("_stext", BASE), ("init_task", BASE + 64)]
    text = {".text": (BASE, bytes(64))}
    return [
        elf(text, symbols, (BASE + 4096, BUILD_ID)),
        elf(text | {".BTF": (BASE + 8192, toy_btf())}, symbols, (BASE + 4096, BUILD_ID)),
        elf(text, [], None),
    ]


TARGETS = (
    Target("btf", btf_seeds, use_types, longest=1 << 14),
    Target("kallsyms", kallsyms_seeds, kallsyms),
    Target("vmcoreinfo", vmcoreinfo_seeds, vmcoreinfo),
    Target("vmlinux", lambda: iter(files()), vmlinux, longest=1 << 14),
)
