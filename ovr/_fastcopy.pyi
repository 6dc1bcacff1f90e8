"""The native loops: map guest RAM, walk page tables, copy and compare pages.

Arrays are one-dimensional, C-contiguous structured numpy arrays:

* ``PIECE`` (``gva``, ``size``, ``offset``): a range of guest virtual addresses, in bytes, whole
  pages, and where its content starts in the source.
* ``RUN`` (``gva``, ``gpa``, ``size``, ``offset``, ``flags``, ``page_shift``): a piece, or a part of
  one, that is contiguous in guest physical memory. ``flags`` is a sum of ``WRITE`` and ``USER``
  (the PTE's bits), ``PROTNONE`` (mapped, but not for the MMU), ``OWNED`` (the guest kernel's
  ``struct page`` says what `frames` asks for), and of ``SOFT_DIRTY`` where a walk is asked to tell
  such pages apart; ``page_shift`` is 12, 21 or 30.
* ``PAIR`` (``one``, ``other``, ``size``): ranges of whole pages in two sources, to be compared.

All loops over pages run with the GIL released, so that threads can share the work. Where guest RAM
or a source is a mapped file that somebody cuts off meanwhile, they end with an error:
`RamNotShared` of guest RAM, `OSError` (``EIO``, ``CUT_OFF``) of a source. What was written until
then stays written.
"""

from collections.abc import Iterable
from typing import Any, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

WRITE: Final[int]
USER: Final[int]
PROTNONE: Final[int]
OWNED: Final[int]
SOFT_DIRTY: Final[int]
PIECE: Final[np.dtype[Any]]
RUN: Final[np.dtype[Any]]
PAIR: Final[np.dtype[Any]]
CUT_OFF: Final[str]

class _Frames(Protocol):
    @property
    def root(self) -> int: ...
    @property
    def levels(self) -> int: ...
    @property
    def vmemmap(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def mapping(self) -> int: ...
    @property
    def compound_head(self) -> int: ...
    @property
    def page_mask(self) -> int: ...
    @property
    def folio_mask(self) -> int: ...
    @property
    def folio_value(self) -> int: ...
    @property
    def mapping_mask(self) -> int: ...
    @property
    def mapping_value(self) -> int: ...
    @property
    def dirty_mask(self) -> int: ...
    @property
    def clean_mask(self) -> int: ...
    @property
    def clean_value(self) -> int: ...

class Hold:
    """A process that holds a VM still when it is asked to: ``native/hold.h``, ``tracer.c``.

    While it does, its gate is open: maps that it governs can be written to.
    """

    def __new__(cls, pid: int, *, bound: float, patience: float) -> Self:
        """Start it.

        Args:
            pid: of QEMU.
            bound: seconds after which it breaks a hold off.
            patience: seconds that QEMU's threads may take to stop.

        Raises:
            OSError: it cannot be started; ``ESRCH`` or ``ENOENT``: there is no such QEMU.
        """

    def take(self) -> int:
        """Hold the VM; returns a value of ``enum hold_result``, 0 if it is held."""

    def let_go(self) -> int:
        """Let the VM run; returns a value of ``enum hold_result``, 0 if it was held until now."""

    def close(self) -> None:
        """End the process; a VM that is held runs on."""

    @property
    def tracer(self) -> int:
        """The pid of the process; 0 if it has ended."""

    @property
    def way(self) -> int:
        """How the VM is held, a value of ``enum hold_way``; 0 before the first hold."""

    @property
    def who(self) -> int:
        """Whom the last result was about: a thread of QEMU that does not stop, or its tracer."""

class RamMap:
    """Guest RAM, mapped into this process.

    `slots` holds (GPA, size, file descriptor, offset), all in bytes; the descriptors may be
    closed afterwards. Addresses from the guest are checked against the slots at every use.

    It can be written to while a `Hold` that governs it holds its VM; `unheld`, also without any.
    """

    def __new__(
        cls, slots: Iterable[tuple[int, int, int, int]], *, writable: bool, unheld: bool = False
    ) -> Self:
        """Map the slots.

        Raises:
            ValueError: a slot reaches past the end of its file.
            OSError: a file cannot be mapped.
        """

    def close(self) -> None:
        """Unmap; later accesses raise `GuestFault`.

        Raises:
            BufferError: another thread is inside one of the loops.
        """

    def govern(self, hold: Hold) -> None:
        """Have all writes from here on go through the gate of `hold`.

        Raises:
            BufferError: another thread is inside one of the loops.
        """

    def read(self, gpa: int, size: int) -> bytes:
        """Read `size` bytes. Raises `GuestFault` if any of them is not RAM."""

    def write(self, gpa: int, data: Buffer) -> None:
        """Write `data`; aligned 4- and 8-byte values are stored whole.

        Raises:
            GuestFault: some byte would not land in RAM; nothing was written.
            PermissionError: the map is read-only, or the VM is not held; nothing was written.
            HoldBroken: the hold was broken off; nothing was written.
        """

    def find(self, gpa: int, end: int, needle: Buffer, step: int) -> int:
        """Return the GPA of the first `needle` in ``[gpa, end)``, or -1.

        The search ends with the slot that holds `gpa`. With `step` > 1 only addresses
        ``gpa + n * step`` are looked at.
        """

    def translate(self, root: int, levels: int, gva: int) -> int:
        """Return the GPA of `gva` (Intel SDM vol. 3, 4.5). Raises `GuestFault` if unmapped."""

    def walk(
        self,
        root: int,
        levels: int,
        pieces: NDArray[np.void],
        frames: _Frames | None = None,
        *,
        soft_dirty: bool = False,
    ) -> NDArray[np.void]:
        """Return the `RUN` array of all pages of `pieces` that are mapped, in order.

        `frames` says where the guest's struct page array is; without it no run is
        ``OWNED``. With `soft_dirty`, runs of entries with the soft-dirty bit
        (Documentation/admin-guide/mm/soft-dirty.rst) are ``SOFT_DIRTY``. Holes are simply absent
        from the result.

        Raises:
            GuestFault: a page table lies outside of RAM or has a reserved bit set; there are more
                runs than two for each page of RAM, and more than 2**20; or a piece
                is not canonical.
            ValueError: a piece is empty or not page-aligned, or `frames` makes no sense.
        """

    def prefault(self, runs: NDArray[np.void]) -> None:
        """Map the host pages behind `runs` ahead of the copy.

        Raises:
            RamNotShared: the RAM file was cut off.
        """

    def copy_in(
        self, runs: NDArray[np.void], fd: int, base: int, size: int, *, wait: bool = True
    ) -> int:
        """Copy a source's ``[run.offset:][:run.size]`` to ``run.gpa`` for every run.

        The source is the `size` bytes of a file from `base` on; ``preadv2`` copies them. Without
        `wait` it ends where the source is not in the page cache (``RWF_NOWAIT``).

        Returns the number of bytes copied, in the order of the runs: it also ends when half of the
        time is over that the hold may last.

        Raises:
            GuestFault: a run is not RAM; nothing was written.
            ValueError: a run reaches past the end of the source; nothing was written.
            PermissionError: the map is read-only, or the VM is not held; nothing was written.
            HoldBroken: the hold was broken off; what was written until then stays.
            OSError: the file was cut off, or cannot be read; ``EOPNOTSUPP``: not without waiting.
            RamNotShared: that of the guest's RAM was cut off.
        """

    def copy_from(self, runs: NDArray[np.void], source: Buffer) -> int:
        """Copy ``source[run.offset:][:run.size]`` to ``run.gpa``, for every run.

        Returns and raises what `copy_in` does; `source` is memory of this process's own.
        """

    def copy_across(self, runs: NDArray[np.void], other: RamMap) -> int:
        """Copy ``run.size`` bytes at the GPA ``run.offset`` of another guest to ``run.gpa``.

        Returns and raises what `copy_from` does; `GuestFault`: a run is not RAM, here or there.
        """

    def copy_to(self, runs: NDArray[np.void], target: Buffer, zero: NDArray[np.uint8]) -> int:
        """Copy ``run.size`` bytes from ``run.gpa`` to ``target[run.offset:]`` for every run.

        `zero` has an element for each page, in the order of the runs. Those of pages that are
        copied tell afterwards whether they have zeros only (1 or 0).

        Returns the number of bytes copied, in the order of the runs: it also ends when half of the
        time is over that the hold may last.

        Raises:
            GuestFault: a run is not RAM; nothing was copied.
            ValueError: a run reaches past the end of the target or has parts of pages, or `zero`
                is too short; nothing was copied.
            RamNotShared: the RAM file was cut off.
            OSError: the target is a mapped file, and was cut off, or its disk is full.
        """

    def review(
        self, runs: NDArray[np.void], fd: int, base: int, size: int, *, wait: bool = True
    ) -> tuple[int, int | None]:
        """Compare a source's ``[run.offset:][:run.size]`` with what is at ``run.gpa``.

        Source, `wait` and an early end as with `copy_in`. Returns the number of bytes that were
        compared and are equal, in the order of the runs, and the GVA of the first page that
        differs, or None.

        Raises:
            GuestFault: a run is not RAM.
            ValueError: a run reaches past the end of the source.
            OSError: the file was cut off, or cannot be read; ``EOPNOTSUPP``: not without waiting.
            RamNotShared: that of the guest's RAM was cut off.
        """

    def first_difference(self, runs: NDArray[np.void], source: Buffer) -> int | None:
        """Compare ``source[run.offset:][:run.size]`` with what is at ``run.gpa``, for every run.

        Returns the GVA of the first page that differs, or None.

        Raises:
            GuestFault: a run is not RAM.
            ValueError: a run reaches past the end of `source`.
            OSError: the file behind `source` was cut off, or has a bad page.
            RamNotShared: that of the guest's RAM was.
        """

    def first_difference_across(self, runs: NDArray[np.void], other: RamMap) -> int | None:
        """Compare ``run.size`` bytes at the GPA ``run.offset`` of another guest with ``run.gpa``.

        Returns and raises what `first_difference` does; `GuestFault` as `copy_across`.
        """

def in_page_cache(fd: int, offset: int, size: int) -> bool:
    """Tell whether a range of a file is in the page cache, all of it (``cachestat``).

    False too where the kernel cannot tell: before Linux 6.5, and for some file systems.

    Raises:
        ValueError: not a range of a file.
    """

def is_in_memory(fd: int) -> bool:
    """Return whether a file is in a tmpfs, whose pages are only in memory and swap.

    Raises:
        OSError: it cannot be told.
    """

def punch_hole(fd: int, at: int, size: int) -> None:
    """Make a range of a file a hole: zeros that take no space.

    Raises:
        OSError: it fails; ``EOPNOTSUPP``: its file system has no holes.
    """

def equal_pages(one: Buffer, other: Buffer, pairs: NDArray[np.void]) -> NDArray[np.bool_]:
    """Tell which pages of two sources are equal: one element a page, in the order of `pairs`.

    Raises:
        ValueError: a range is not of whole pages, or reaches past the end of its source.
        OSError: the file behind a source was cut off, or has a bad page.
    """
