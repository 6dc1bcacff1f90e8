"""Finding the Linux kernel in guest RAM, from the RAM alone.

VMCOREINFO gives the addresses of the kernel's page table and symbol table, the symbol table that of
its BTF, and BTF the layout of its memory. VMCOREINFO is checked against the kernel itself first.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

from ovr.errors import GuestFault, KernelNotFound
from ovr.kernel.find import places
from ovr.kernel.find.kallsyms import read_kallsyms
from ovr.kernel.find.places import Place
from ovr.kernel.find.vmcoreinfo import (
    START_KERNEL_MAP,
    VmcoreInfo,
    candidate_at,
    candidates,
    incomplete_release,
)
from ovr.kernel.find.vmlinux import Vmlinux
from ovr.kernel.symbols import SymbolTable
from ovr.kernel.types.btf import Btf
from ovr.kernel.types.live import types_that_fit
from ovr.kernel.types.types import Types
from ovr.kernel.types.view import NoSuchMember, Struct
from ovr.memory.addresses import Gva
from ovr.memory.paging import AddressSpace, Frames, pieces
from ovr.memory.ram import GuestRam

__all__ = ["GLOBALS", "Kernel"]

GLOBALS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "init_nsproxy": "struct nsproxy",
        "init_pid_ns": "struct pid_namespace",
        "init_task": "struct task_struct",
        "init_uts_ns": "struct uts_namespace",
        "page_offset_base": "unsigned long",
        "vmemmap_base": "unsigned long",
    }
)
"""Types of the global variables that we use: BTF has none."""

MAX_BTF: Final = 1 << 26
_MAPPING_FLAGS: Final = 3  # of page->mapping; both mean a page of KSM
_MAPPING_ANON: Final = 1
RELEASE_OFFSET: Final = 2 * 65
"""``offsetof(struct new_utsname, release)``: user space ABI."""


class _Stale(KernelNotFound):
    # VMCOREINFO without a kernel: reported only if there is no better reason.
    pass


class Kernel:
    """A running Linux kernel, seen through guest RAM; `find` makes one.

    Attributes:
        ram: the guest's RAM.
        space: the kernel's address space.
        info: its VMCOREINFO.
        symbols: its symbol table.
        types: its types.
    """

    def __init__(
        self,
        ram: GuestRam,
        space: AddressSpace,
        info: VmcoreInfo,
        symbols: SymbolTable,
        types: Types,
    ) -> None:
        self.ram = ram
        self.space = space
        self.info = info
        self.symbols = symbols
        self.types = types
        self._boot = self._boot_mark()

    @classmethod
    def find(cls, ram: GuestRam, vmlinux: str | Path | None = None) -> "Kernel":
        """Find the kernel that runs in this RAM.

        Args:
            ram: the guest's RAM.
            vmlinux: the kernel's file, for symbols and types that are not in RAM.

        Raises:
            KernelNotFound: there is none, or it cannot be used; the hint gives the reason.
            UsageError: `vmlinux` cannot be used.
        """
        file = Vmlinux.open(vmlinux) if vmlinux else None
        kernel = _known(cls, ram, file)
        if kernel is None:
            kernel = _searched(cls, ram, file)
            with suppress(KernelNotFound, GuestFault):  # without a clock it is searched again
                places.note(Place.now(kernel.info.gpa, kernel.wall_clock()))
        return kernel

    def close(self) -> None:
        """Release the kernel's types; its objects cannot be used afterwards."""
        self.types.close()

    @property
    def release(self) -> str:
        """The output of ``uname -r`` in the guest."""
        return self.info.release

    @property
    def build_id(self) -> str:
        """The build id of the kernel in hexadecimal; empty if it has none."""
        return self.info.build_id

    def symbol(self, name: str) -> Gva:
        """Return the address of a symbol.

        Raises:
            KernelNotFound: the kernel has no such symbol.
        """
        address = self.symbols.get(name)
        if address is None:
            raise KernelNotFound(
                f"the guest's kernel has no symbol {name}",
                "it must have CONFIG_KALLSYMS_ALL; else see the support matrix",
            )
        return address

    def object(self, type_name: str, address: Gva) -> Any:
        """Return the object at `address`: a `Struct`, an `Array`, or the value of a scalar."""
        return self.types.object(type_name, self.space, address)

    def pointer(self, type_name: str, address: Gva) -> Any:
        """Return a pointer to `address`: ``pointer("unsigned long", at)[0] = 1`` writes there."""
        return self.types.pointer(type_name, self.space, address)

    def __getitem__(self, name: str) -> Any:
        """Return a global variable of `GLOBALS`: a view, or a scalar's value."""
        return self.object(GLOBALS[name], self.symbol(name))

    @cached_property
    def anonymous_frames(self) -> Frames:
        """Frames of anonymous pages, whoever shares them: ``PageAnon(page) && !PageKsm(page)``."""
        any_flag = (1 << 64) - 1
        return replace(self.private_frames, page_mask=0, dirty_mask=any_flag)

    @cached_property
    @types_that_fit()
    def private_frames(self) -> Frames:
        """Frames owned by a single process, whose content reclaim keeps after a write.

        ``PageAnon(page) && !PageKsm(page) && PageAnonExclusive(page)``, include/linux/page-flags.h,
        and not under writeback. A clean folio without a copy in swap is written there before it is
        reclaimed (``shrink_folio_list`` dirties it); with a copy, or after ``MADV_FREE``, it is
        dropped.
        """
        types = self.types
        try:
            # Linux kernel commit "mm: rename the 'compound_head' field in the 'struct page' to
            # 'compound_info'" (before v7.2)
            compound_head = types.offsetof("struct page", "compound_info")
        except NoSuchMember:
            compound_head = types.offsetof("struct page", "compound_head")
        frames = Frames(
            root=self.space.root,
            levels=self.space.levels,
            vmemmap=Gva(self["vmemmap_base"]),
            stride=types.sizeof("struct page"),
            flags=types.offsetof("struct page", "flags"),
            mapping=types.offsetof("struct page", "mapping"),
            compound_head=compound_head,
            page_mask=self._flag("PG_anon_exclusive"),
            folio_mask=self._flag("PG_writeback"),
            folio_value=0,
            mapping_mask=_MAPPING_FLAGS,
            mapping_value=_MAPPING_ANON,
            dirty_mask=self._flag("PG_dirty"),
            clean_mask=self._flag("PG_swapbacked") | self._flag("PG_swapcache"),
            clean_value=self._flag("PG_swapbacked"),
        )
        if not frames.usable:
            raise KernelNotFound(
                "the guest kernel's struct page is invalid",
                "is the guest's kernel supported? see the support matrix",
            )
        return frames

    def _flag(self, name: str) -> int:
        # One of `enum pageflags` as a mask.
        number = self.types.enum("enum pageflags")[name]
        if not 0 <= number < 64:
            raise KernelNotFound(f"the guest kernel's {name} is bit {number} of page->flags")
        return 1 << number

    @types_that_fit()
    def anon_frames(self, anon_vma: Gva) -> Frames:
        """Frames of anonymous pages that only users of the ``struct anon_vma`` can have mapped.

        They are not locked: the kernel locks a folio before it moves, splits, merges or reclaims
        it. Pages of KSM have another ``mapping``.
        """
        return replace(
            self.private_frames,
            page_mask=0,
            folio_mask=self._flag("PG_locked") | self._flag("PG_writeback"),
            folio_value=0,
            mapping_mask=(1 << 64) - 1,
            mapping_value=anon_vma | _MAPPING_ANON,
        )

    @types_that_fit()
    def shared_frames(self, mapping: Gva) -> Frames:
        """Frames in the page cache of a shared object.

        Their folio belongs to the ``struct address_space`` at `mapping`, is up to date and not
        locked: the kernel locks a folio before it moves, splits, truncates or reclaims it. It is
        dirty: a clean one has the content of a hole, and reclaim turns it into a hole again.
        """
        uptodate = self._flag("PG_uptodate")
        return replace(
            self.private_frames,
            page_mask=0,
            folio_mask=self._flag("PG_locked") | self._flag("PG_writeback") | uptodate,
            folio_value=uptodate,
            mapping_mask=(1 << 64) - 1,
            mapping_value=mapping,
            clean_mask=0,
            clean_value=0,
        )

    @types_that_fit()
    def wall_clock(self) -> int:
        """Return the kernel's time of day, in seconds since 1970.

        Source: struct timekeeper, kernel/time/timekeeping.c.
        """
        # Linux kernel commit 22c62b9a84b8 ("timekeeping: Introduce auxiliary timekeepers")
        # (in v6.17) made tk_core an element of timekeeper_data.
        base = self.symbols.get("timekeeper_data") or self.symbol("tk_core")
        if "struct tk_data" in self.types:
            offset = self.types.offsetof("struct tk_data", "timekeeper")
        else:
            offset = 8  # after the sequence count, in a struct without a name
        seconds: int = self.pointer("struct timekeeper", Gva(base + offset)).xtime_sec
        return seconds

    def same_boot(self) -> bool:
        """Tell whether the kernel that was found still runs, in microseconds, by its boot mark."""
        try:
            return self._boot == self._boot_mark()
        except (KernelNotFound, GuestFault):
            return False

    @property
    @types_that_fit()
    def boot_id(self) -> str:
        """The UUID in ``/proc/sys/kernel/random/boot_id``; all zero before it was first read.

        Raises:
            KernelNotFound: the kernel has no such symbol.

        Source: sysctl_bootid in drivers/char/random.c.
        """
        return str(UUID(bytes=self.space.read(self.symbol("sysctl_bootid"), 16)))

    @types_that_fit()
    def _boot_mark(self) -> tuple[bytes, int, int, int]:
        # Differs between any two boots: the start time of pid 1 in nanoseconds, and its address.
        text = self.ram.read(self.info.gpa, len(self.info.text))
        reaper: Struct = self["init_pid_ns"].child_reaper
        if not reaper:
            raise KernelNotFound(
                "the guest's kernel has not started its first process", "wait until it has booted"
            )
        return text, self["page_offset_base"], reaper.address_, reaper.start_boottime


def _known(cls: type[Kernel], ram: GuestRam, vmlinux: Vmlinux | None) -> Kernel | None:
    # A running kernel at a place where one was found before.
    for place in places.recall():
        info = candidate_at(ram, place.gpa)
        with suppress(KernelNotFound, GuestFault):
            if info is not None:
                kernel = _attach(cls, ram, info, vmlinux)
                if place.runs(kernel.wall_clock()):
                    return kernel
    return None


def _searched(cls: type[Kernel], ram: GuestRam, vmlinux: Vmlinux | None) -> Kernel:
    found: list[Kernel] = []
    reasons: list[KernelNotFound] = []
    for info in candidates(ram):
        try:
            found.append(_attach(cls, ram, info, vmlinux))
        except KernelNotFound as reason:
            reasons.append(reason)
        except GuestFault as fault:
            reasons.append(
                KernelNotFound(
                    f"the guest's kernel is invalid: {fault}", "has it booted? try again"
                )
            )
    if found:
        reasons.clear()  # their tracebacks hold this function's variables: a cycle
        # After a reboot or kexec, the previous kernel may still be complete in RAM.
        return found[0] if len(found) == 1 else max(found, key=cls.wall_clock)
    if reasons:
        raise min(reasons, key=lambda reason: isinstance(reason, _Stale))
    if release := incomplete_release(ram):
        raise KernelNotFound(
            f"the VMCOREINFO of Linux {release} does not say all that is needed",
            "Linux 6.1 is the oldest that is supported (docs/support-matrix.md)",
        )
    raise KernelNotFound(
        "no Linux kernel in guest RAM: there is no VMCOREINFO",
        "has the guest booted? its kernel must have CONFIG_VMCORE_INFO (or CONFIG_CRASH_CORE)",
    )


@types_that_fit()
def _attach(cls: type[Kernel], ram: GuestRam, info: VmcoreInfo, vmlinux: Vmlinux | None) -> Kernel:
    if info.numbers.get("sme_mask", 0):
        raise KernelNotFound(
            "the guest's memory is encrypted (SME or SEV)", "boot it without memory encryption"
        )
    space = AddressSpace(ram, info.page_table, info.levels)
    _check(space, info)
    symbols = vmlinux.symbols(vmlinux.slide(space, info)) if vmlinux else None
    symbols = symbols or read_kallsyms(space, info)
    data = (vmlinux and vmlinux.btf) or _read_btf(space, symbols)
    if not data:
        raise KernelNotFound(
            "the guest's kernel does not describe its types",
            "it must have CONFIG_DEBUG_INFO_BTF and CONFIG_KALLSYMS_ALL; or give its --vmlinux "
            "with a section .BTF (pahole -J makes one from debug information)",
        )
    return cls(ram, space, info, symbols, Types(Btf(data, info.build_id)))


def _check(space: AddressSpace, info: VmcoreInfo) -> None:
    # A page of text alone is no kernel: the kernel's memory must agree with it.
    uts = Gva(info.symbols["init_uts_ns"] + info.offsets["uts_namespace.name"])
    try:
        release = space.read(Gva(uts + RELEASE_OFFSET), 65).partition(b"\0")[0]
        there = release == info.release.encode() and _in_one_piece(space, info)
    except GuestFault:
        there = False
    if not there:
        raise _Stale(
            f"the VMCOREINFO at GPA {info.gpa:#x} describes no kernel in RAM",
            "was the guest rebooted? wait until it has booted",
        )


def _in_one_piece(space: AddressSpace, info: VmcoreInfo) -> bool:
    # x86-64 maps only the kernel image here, physically contiguous. After a reboot, the next kernel
    # may reuse the page tables of the previous one, which then mix both.
    runs = space.walk(pieces([(START_KERNEL_MAP, info.numbers["KERNEL_IMAGE_SIZE"], 0)]))
    stext = info.symbols["_stext"]
    starts = {(gva - gpa) % (1 << 64) for gva, gpa in runs[["gva", "gpa"]].tolist()}
    covered = any(gva <= stext < gva + size for gva, size in runs[["gva", "size"]].tolist())
    return covered and starts == {stext - info.image_gpa(stext)}


def _read_btf(space: AddressSpace, symbols: SymbolTable) -> bytes | None:
    start, stop = symbols.get("__start_BTF"), symbols.get("__stop_BTF")
    if start is None or stop is None or start == stop:
        return None
    if not 0 < stop - start <= MAX_BTF:
        raise KernelNotFound(f"the guest kernel's BTF is damaged: it has {stop - start} bytes")
    return space.read(start, stop - start)
