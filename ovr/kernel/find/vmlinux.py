"""A vmlinux file: symbols and types of a kernel that keeps none, or not all, in its memory.

The ELF symbol table and section .BTF are taken from the file if it has them, the rest comes from
guest RAM as usual. The file must be that of the running kernel: the guest must hold the file's
build id at the address given by the file.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ovr.errors import GuestFault, KernelNotFound, UsageError
from ovr.kernel.find.vmcoreinfo import START_KERNEL_MAP, VmcoreInfo
from ovr.kernel.symbols import SymbolTable
from ovr.memory.addresses import Gva

if TYPE_CHECKING:
    from typing import Self

    from ovr.memory.paging import AddressSpace

__all__ = ["Vmlinux"]

MAX_SECTION: Final = 1 << 28
BUILD_ID_SIZES: Final = range(8, 65)
NOTE_HEADER: Final = 12 + len(b"GNU\0")
SYMBOL: Final = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"),
     ("size", "<u8")]
)  # fmt: skip
STT_SECTION: Final = 3
STT_FILE: Final = 4


@dataclass(frozen=True)
class Vmlinux:
    """The content of a vmlinux file; `open` reads one. Addresses are link-time, without KASLR.

    Attributes:
        path: the file.
        build_id: in hexadecimal.
        build_id_at: its link-time address in the kernel's memory.
        btf: section .BTF, or None.
    """

    path: Path
    build_id: str
    build_id_at: Gva
    btf: bytes | None
    _symbols: NDArray[np.void] | None
    _names: bytes

    @classmethod
    def open(cls, path: str | Path) -> "Self":
        """Read a file.

        Raises:
            UsageError: it cannot be read, is no vmlinux, or has neither symbols nor types.
        """
        # not at the top of the module: it takes longer to import than an attach
        from elftools.elf.elffile import ELFFile  # noqa: PLC0415

        path = Path(path)
        try:
            with path.open("rb") as file:
                return cls._read(path, ELFFile(file))
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        except _elf_errors() as error:
            raise _unusable(
                path, f"no usable ELF file ({error or type(error).__name__})"
            ) from error

    @classmethod
    def _read(cls, path: Path, elf: Any) -> "Self":
        if elf.get_machine_arch() != "x64":
            raise _unusable(path, f"for {elf.get_machine_arch()}")
        symbols = _content(elf.get_section_by_name(".symtab"))
        names = _content(elf.get_section_by_name(".strtab")) if symbols else None
        btf = _content(elf.get_section_by_name(".BTF"))
        if btf is None and not names:
            raise _unusable(path, "without .symtab and .BTF")
        table = np.frombuffer(symbols, SYMBOL) if symbols and names else None
        return cls(path, *_build_id(path, elf), btf, table, names or b"")

    def slide(self, space: "AddressSpace", info: VmcoreInfo) -> int:
        """Return how far KASLR moved the kernel, in bytes.

        Raises:
            KernelNotFound: the guest runs another kernel.
        """
        try:
            slide = int(info.values.get("KERNELOFFSET", ""), 16)
            if not 0 <= slide < -START_KERNEL_MAP % (1 << 64):
                raise ValueError(slide)
            there = space.read(Gva(self.build_id_at + slide), len(self.build_id) // 2).hex()
        except (ValueError, GuestFault):
            there = ""
        if there != self.build_id:
            raise KernelNotFound(
                f"{self.path} is of another kernel (build id {self.build_id}) than the guest's, "
                f"{info.release} (build id {info.build_id or 'unknown'})",
                "give the vmlinux of exactly the kernel that the guest runs",
            )
        return slide

    def symbols(self, slide: int) -> SymbolTable | None:
        """Return the symbols where KASLR put them; None if the file has none."""
        if self._symbols is None:
            return None
        kind = self._symbols["info"] & 0xF
        named = (self._symbols["name"] != 0) & (self._symbols["section"] != 0)
        found = self._symbols[named & (kind != STT_SECTION) & (kind != STT_FILE)]
        # Per-cpu symbols of older kernels are offsets: they lie far below and do not move.
        moves = found["value"] >= START_KERNEL_MAP
        addresses = found["value"] + np.where(moves, np.uint64(slide), np.uint64(0))
        names = np.frombuffer(self._names, np.uint8)
        return SymbolTable(names, found["name"].astype(np.int64), addresses, b"\0")


def _elf_errors() -> tuple[type[Exception], ...]:
    # Beside its own errors, pyelftools raises many others on damaged files.
    from elftools.common.exceptions import ELFError  # noqa: PLC0415
    from elftools.construct import ConstructError  # noqa: PLC0415

    return (
        *(ELFError, ConstructError, struct.error, zlib.error),
        *(ValueError, LookupError, TypeError, AttributeError, AssertionError),
        *(ArithmeticError, NotImplementedError, EOFError, RecursionError),
    )


def _build_id(path: Path, elf: Any) -> tuple[str, Gva]:
    for section in elf.iter_sections("SHT_NOTE"):
        for note in section.iter_notes():
            if note["n_type"] == "NT_GNU_BUILD_ID" and len(note["n_desc"]) // 2 in BUILD_ID_SIZES:
                at = section["sh_addr"] + note["n_offset"] - section["sh_offset"] + NOTE_HEADER
                return note["n_desc"], Gva(at)
    raise _unusable(path, "without a build id")


def _content(section: Any) -> bytes | None:
    # In separate debug files, some sections are headers without content.
    if section is None or section["sh_type"] == "SHT_NOBITS":
        return None
    if section.data_size > MAX_SECTION:
        raise ValueError(f"section {section.name} has {section.data_size} bytes")
    data: bytes = section.data()
    return data


def _unusable(path: Path, why: str) -> UsageError:
    return UsageError(
        f"{path} is {why}",
        "--vmlinux takes the uncompressed kernel with its symbol table or .BTF; extract-vmlinux "
        "makes one from a bzImage, and pahole -J makes .BTF from debug information",
    )
