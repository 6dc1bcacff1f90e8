"""VMCOREINFO: the page of text in which a kernel describes its layout to crash dump tools.

The kernel writes it once, early in boot. The page stays recognisable after the kernel is gone
(reboot, kexec), so callers must check each of the `candidates`.

Source: kernel/vmcore_info.c (kernel/crash_core.c before it), arch/x86/kernel/vmcore_info_64.c.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ovr.errors import GuestFault
from ovr.memory.addresses import PAGE_SIZE, Gpa, Gva
from ovr.memory.ram import GuestRam

__all__ = [
    "START_KERNEL_MAP",
    "VmcoreInfo",
    "candidate_at",
    "candidates",
    "incomplete_release",
    "parse",
]

START_KERNEL_MAP: Final = 0xFFFF_FFFF_8000_0000
"""``__START_KERNEL_map``: where x86-64 maps the kernel image."""

IMAGE_SIZES: Final = range(1 << 29, (1 << 30) + 1, PAGE_SIZE)
"""The largest size of that mapping, in bytes."""

FIRST_KEY: Final = b"OSRELEASE="
MAX_SIZE: Final = 4 * PAGE_SIZE
RELEASE: Final = re.compile(rb"OSRELEASE=(\d[\w.+~-]{0,63})\n")
LINE: Final = re.compile(r"([A-Z][A-Z_-]*)(?:\(([\w.]+)\))?=(.*)")
REQUIRED_SYMBOLS: Final = (
    "_stext",
    "init_uts_ns",
    "swapper_pg_dir",
)
REQUIRED_NUMBERS: Final = ("phys_base", "pgtable_l5_enabled", "KERNEL_IMAGE_SIZE")


@dataclass(frozen=True)
class VmcoreInfo:
    """The content of one VMCOREINFO text.

    Attributes:
        gpa: its address.
        text: the text itself.
        values: the plain ``KEY=value`` lines.
        symbols: ``SYMBOL(name)`` lines: addresses.
        numbers: ``NUMBER(name)`` lines.
        offsets: ``OFFSET(struct.member)`` lines, in bytes.
    """

    gpa: Gpa
    text: bytes
    values: dict[str, str]
    symbols: dict[str, Gva]
    numbers: dict[str, int]
    offsets: dict[str, int]

    @property
    def release(self) -> str:
        """The output of ``uname -r`` in the guest."""
        return self.values["OSRELEASE"]

    @property
    def build_id(self) -> str:
        """The build id of the kernel in hexadecimal; empty if the kernel has none."""
        return self.values.get("BUILD-ID", "")

    @property
    def levels(self) -> int:
        """The number of levels of the page tables: 4 or 5."""
        return 5 if self.numbers["pgtable_l5_enabled"] else 4

    @property
    def page_table(self) -> Gpa:
        """The GPA of the kernel's top page table."""
        return self.image_gpa(self.symbols["swapper_pg_dir"])

    def image_gpa(self, address: Gva) -> Gpa:
        """Return the GPA of an address within the kernel image (``__phys_addr_symbol``)."""
        return Gpa(address - START_KERNEL_MAP + self.numbers["phys_base"])


def candidates(ram: GuestRam) -> Iterator[VmcoreInfo]:
    """Yield all well-formed VMCOREINFO texts in RAM, by address."""
    # The kernel gets the text's pages straight from the page allocator.
    for gpa in ram.find(FIRST_KEY, step=PAGE_SIZE):
        info = candidate_at(ram, gpa)
        if info is not None:
            yield info


def candidate_at(ram: GuestRam, gpa: Gpa) -> VmcoreInfo | None:
    """Return the well-formed VMCOREINFO text that begins at `gpa`, or None."""
    return parse(gpa, _text(ram, gpa))


def incomplete_release(ram: GuestRam) -> str | None:
    """Return the release of a kernel whose VMCOREINFO is too short for `candidates`, or None.

    Before v5.11 it had no offset of ``uts_namespace.name``.
    """
    for gpa in ram.find(FIRST_KEY, step=PAGE_SIZE):
        text = _text(ram, gpa)
        match = RELEASE.match(text)
        if match and b"\nPAGESIZE=" in text and parse(gpa, text) is None:
            return match[1].decode()
    return None


def parse(gpa: Gpa, text: bytes) -> VmcoreInfo | None:
    """Parse `text`; None if it is not a complete VMCOREINFO of an x86-64 kernel."""
    values: dict[str, str] = {}
    groups: dict[str, dict[str, int]] = {"SYMBOL": {}, "NUMBER": {}, "OFFSET": {}}
    try:
        for line in text.decode("ascii").splitlines():
            match = LINE.fullmatch(line)
            if match is None:
                return None
            key, name, value = match.groups()
            if name is None:
                values[key] = value
            elif key in groups:
                groups[key][name] = int(value, 16 if key == "SYMBOL" else 0)
    except ValueError:
        return None
    symbols = {name: Gva(address) for name, address in groups["SYMBOL"].items()}
    info = VmcoreInfo(gpa, text, values, symbols, groups["NUMBER"], groups["OFFSET"])
    return info if _complete(info) else None


def _complete(info: VmcoreInfo) -> bool:
    return (
        info.text.startswith(FIRST_KEY)
        and info.values.get("PAGESIZE") == str(PAGE_SIZE)
        and all(name in info.numbers for name in REQUIRED_NUMBERS)
        and all(info.symbols.get(name, 0) >= START_KERNEL_MAP for name in REQUIRED_SYMBOLS)
        and info.numbers["KERNEL_IMAGE_SIZE"] in IMAGE_SIZES
        and "uts_namespace.name" in info.offsets
    )


def _text(ram: GuestRam, gpa: Gpa) -> bytes:
    # Up to the first NUL; one page at a time, since RAM may end after any of them.
    text = b""
    try:
        while b"\0" not in text and len(text) < MAX_SIZE:
            text += ram.read(Gpa(gpa + len(text)), PAGE_SIZE)
    except GuestFault:
        return b""
    return text.partition(b"\0")[0]
