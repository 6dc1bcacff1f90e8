"""BTF made of a vmlinux's DWARF, for kernels that have no BTF: what pahole does, of fewer types.

Wanted are the types of `ROOTS` and all that they lead to. A kernel's DWARF is hundreds of
megabytes, in which most of these types are declared in every compile unit and defined in few. So
nothing is read in order: where a definition may be, the offset of its name in .debug_str gives
away; pyelftools parses what is there. Of definitions of the same name the first is taken.

Source: DWARF 5, chapter 7.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from ovr.errors import UsageError
from ovr.kernel.cache import remembered
from ovr.kernel.find.elf_errors import elf_errors
from ovr.kernel.types.dwarf_types import Converter, Name, name_of

__all__ = ["ROOTS", "dwarf_to_btf"]

ROOTS: Final = (
    *("enum cgroup_subsys_id", "enum maple_type", "enum pageflags", "enum pid_type"),
    *("enum transparent_hugepage_flag", "struct anon_vma", "struct anon_vma_chain"),
    *("struct cgroup",),
    *("struct cgroup_namespace", "struct cgroup_subsys_state", "struct cpumask", "struct cred"),
    *("struct css_set", "struct dentry", "struct eventfd_ctx", "struct fdtable", "struct file"),
    *("struct file_system_type", "struct files_struct", "struct fs_struct", "struct inode"),
    *("struct ipc_namespace", "struct kernfs_node", "struct kthread", "struct maple_node"),
    *("struct mem_cgroup", "struct mm_struct", "struct mnt_namespace", "struct net"),
    *("struct nsproxy", "struct page", "struct pid", "struct pid_namespace"),
    *("struct pids_cgroup", "struct sighand_struct", "struct signal_struct"),
    *("struct signalfd_ctx", "struct super_block", "struct task_struct"),
    *("struct time_namespace", "struct timekeeper", "struct timerfd_ctx", "struct tk_data"),
    *("struct tty_file_private", "struct tty_struct", "struct user_namespace"),
    *("struct uts_namespace", "struct vm_area_struct", "struct worker", "struct xa_node"),
)
"""The types that we name, and those that we reach through pointers to what is only declared."""

FORMAT: Final = b"1"  # of what is remembered: changes with what is made of the same DWARF
MAX_SECTION: Final = 1 << 30
MAX_UNITS: Final = 1 << 16
CHUNK: Final = 1 << 24
KEYWORDS: Final = {
    "struct": "DW_TAG_structure_type",
    "union": "DW_TAG_union_type",
    "enum": "DW_TAG_enumeration_type",
}


def dwarf_to_btf(path: Path, build_id: str, roots: Sequence[str] = ROOTS) -> bytes:
    """Return a file's `roots`, and the types that they lead to, as the content of a .BTF section.

    Args:
        path: an ELF file.
        build_id: its build id; what was made once is remembered under it.
        roots: type names as in C, ``"struct file"``; those that the file lacks are left out.

    Raises:
        UsageError: the file cannot be read, is damaged, or has none of the types.
    """
    try:
        status = path.stat()
        version = f"{build_id} {status.st_size} {status.st_mtime_ns}".encode()
        source = (FORMAT, version, "\n".join(roots).encode())
        (made,) = remembered(build_id, "dwarf", source, lambda: (_convert(path, roots),))
        return made.tobytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except elf_errors() as error:
        raise UsageError(
            f"{path} has no usable DWARF ({error or type(error).__name__})",
            "give the kernel's vmlinux with its debug information, or one with a section .BTF "
            "(pahole -J makes one)",
        ) from error


def _convert(path: Path, roots: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    # not at the top of the module: see elf_errors.py
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415

    wanted = {(KEYWORDS[keyword], name) for keyword, name in map(str.split, roots)}
    with path.open("rb") as file:
        elf = ELFFile(file)
        for section in elf.iter_sections():
            if section.name.startswith((".debug", ".zdebug")) and section.data_size > MAX_SECTION:
                raise ValueError(f"section {section.name} has {section.data_size} bytes")
        if not elf.has_dwarf_info(strict=True):
            raise ValueError("it has no section .debug_info")
        dwarf = elf.get_dwarf_info(relocate_dwarf_sections=False, follow_links=False)
        converter = Converter()
        for find in (_named, _listed):
            for die in find(dwarf, wanted, converter):
                converter.add(die)
            # A kernel lacks few; if most are missing, its compiler writes names in another way.
            if 2 * len(converter.defined & wanted) >= len(wanted):
                break
        if converter.defined & wanted:
            return np.frombuffer(converter.section(), np.uint8)
    raise ValueError("it defines none of the types that are needed")


def _named(dwarf: Any, wanted: set[Name], converter: Converter) -> Iterator[Any]:
    # The definitions that refer to their name where compilers do: first, and by its offset.
    data = dwarf.debug_info_sec.stream.getvalue()
    names = _references(dwarf, {name for _, name in wanted})
    units = _units(dwarf)
    starts = [unit.cu_offset for unit in units]
    possible = {(tag, name) for tag, name in wanted if name in names.values()}
    for start in range(0, len(data), CHUNK):
        pending = {name for _, name in possible - converter.defined}
        references = [number for number, name in names.items() if name in pending]
        for at in _mentions(data[start : start + CHUNK + 3], references):
            name = names[int.from_bytes(data[start + at : start + at + 4], "little")]
            tags = {tag for tag in KEYWORDS.values() if (tag, name) in possible - converter.defined}
            unit = units[max(bisect_right(starts, start + at) - 1, 0)]
            for size in (1, 2) if tags else ():
                code = data[max(start + at - size, 0) : start + at]
                if _defines(unit, code, tags):
                    die = unit.get_DIE_from_refaddr(start + at - size)
                    if name_of(die) == name:
                        yield die


def _listed(dwarf: Any, wanted: set[Name], converter: Converter) -> Iterator[Any]:
    # The definitions among all types: for compilers that number the names (DW_FORM_strx).
    for unit in _units(dwarf):
        for die in converter.children(unit.get_top_DIE()):
            defined = "DW_AT_declaration" not in die.attributes
            if defined and (die.tag, name_of(die)) in wanted - converter.defined:
                yield die
        if wanted <= converter.defined:
            return


def _units(dwarf: Any) -> list[Any]:
    units = list(islice(dwarf.iter_CUs(), MAX_UNITS + 1))
    if not 0 < len(units) <= MAX_UNITS:
        raise ValueError(f"it has {len(units)} compile units")
    return units


def _references(dwarf: Any, names: set[str]) -> dict[int, str]:
    # What stands for a name in .debug_info: its offset in .debug_str, where it may be the end of
    # another string; or itself, if it is no longer than an offset.
    found = {int.from_bytes(name.encode(), "little"): name for name in names if len(name) == 3}
    section = dwarf.debug_str_sec
    strings = section.stream.getvalue() if section else b""
    for name in names:
        for match in islice(re.finditer(re.escape(name.encode()) + b"\0", strings), MAX_UNITS):
            found[match.start()] = name
    return found


def _mentions(data: bytes, references: Sequence[int]) -> list[int]:
    # Where one of the 32-bit numbers is, aligned or not.
    if not references:
        return []
    limit = max(references) + 1
    table = np.zeros(limit + 1, bool)
    table[references] = True
    found = []
    for shift in range(min(4, len(data) - 3)):
        numbers = np.frombuffer(data, "<u4", (len(data) - shift) // 4, shift)
        found.append(4 * np.flatnonzero(table[np.minimum(numbers, limit)]) + shift)
    return sorted(np.concatenate(found).tolist()) if found else []


def _defines(unit: Any, code: bytes, tags: set[str]) -> bool:
    # Is this the abbreviation code of entries that define such a type, name first?
    *high, last = code or b"\x80"
    if last >= 0x80 or any(byte < 0x80 for byte in high):
        return False
    try:
        number = int(sum((byte & 0x7F) << 7 * index for index, byte in enumerate(code)))
        abbreviation = unit.get_abbrev_table().get_abbrev(number)
    except KeyError:
        return False
    attributes = [attribute for attribute, _ in abbreviation.iter_attr_specs()]
    first = attributes[:1] == ["DW_AT_name"] and "DW_AT_declaration" not in attributes
    return first and abbreviation["tag"] in tags
