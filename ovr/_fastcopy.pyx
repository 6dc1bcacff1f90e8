# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, embedsignature=False
"""The native loops: map guest RAM, walk page tables, copy and compare pages.

The contract of every function is in `_fastcopy.pyi`. Everything read from guest memory is a
claim, not a fact: an address counts only after `_host` found it inside a slot.
"""

import os

import numpy as np

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, madvise, mmap, munmap

from ovr.errors import GuestFault

cdef extern from *:
    """
    #include <string.h>
    #include <stdint.h>

    /* The guest may change any word while we look at it: read it once, whole. */
    static inline uint64_t ovr_read_once(const void *p)
    {
        return __atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED);
    }
    """
    uint64_t read_once "ovr_read_once"(const void *) noexcept nogil
    void *memmem(const void *, size_t, const void *, size_t) noexcept nogil

cdef extern from "Python.h":
    bytes PyBytes_FromStringAndSize(const char *, Py_ssize_t)

cdef enum:
    MADV_POPULATE_READ = 22
    MADV_POPULATE_WRITE = 23

# arch/x86/include/asm/pgtable_types.h
cdef uint64_t PTE_PRESENT = 1
cdef uint64_t PTE_RW = 1 << 1
cdef uint64_t PTE_USER = 1 << 2
cdef uint64_t PTE_PSE = 1 << 7
cdef uint64_t PTE_PROTNONE = 1 << 8
cdef uint64_t PTE_ADDRESS = 0x000FFFFFFFFFF000

cdef enum:
    F_WRITE = 1
    F_USER = 2
    F_PROTNONE = 4
    F_OWNED = 8

WRITE = F_WRITE
USER = F_USER
PROTNONE = F_PROTNONE
OWNED = F_OWNED

PIECE = np.dtype([("gva", "<u8"), ("size", "<u8"), ("offset", "<i8")])
RUN = np.dtype(
    [("gva", "<u8"), ("gpa", "<u8"), ("size", "<u8"), ("offset", "<i8"),
     ("flags", "<u4"), ("page_shift", "<u4")]
)

cdef packed struct Piece:
    uint64_t gva
    uint64_t size
    int64_t offset

PAIR = np.dtype([("one", "<i8"), ("other", "<i8"), ("size", "<u8")])

cdef packed struct Pair:
    int64_t one
    int64_t other
    uint64_t size

cdef packed struct Run:
    uint64_t gva
    uint64_t gpa
    uint64_t size
    int64_t offset
    uint32_t flags
    uint32_t page_shift

cdef struct Slot:
    uint64_t gpa
    uint64_t size
    char *host

cdef struct Frames:
    # Where the guest keeps its `struct page` array and what to look at in an element.
    uint64_t root
    int levels
    uint64_t vmemmap
    uint64_t stride
    uint64_t flags
    uint64_t mapping
    uint64_t compound_head
    # What makes a frame the owner's: bits of its own flags, and of its folio's flags and mapping.
    uint64_t page_mask
    uint64_t folio_mask
    uint64_t folio_value
    uint64_t mapping_mask
    uint64_t mapping_value
    # The last translated piece of the array: consecutive frames are neighbours in it.
    uint64_t cached_gva
    uint64_t cached_size
    char *cached_host

cdef struct Walk:
    Run *runs
    size_t count
    size_t capacity
    Frames *frames
    uint64_t fault          # GPA of a table that is not in RAM, when status is WALK_FAULT
    Piece piece             # the one being walked: gives each run its source offset

cdef enum:
    WALK_OK = 0
    WALK_FAULT = -1
    WALK_NOMEM = -2


cdef class RamMap:
    cdef Slot *_slots
    cdef Py_ssize_t _count
    cdef bint _writable
    cdef int _users

    def __cinit__(self, slots, *, bint writable):
        cdef Py_ssize_t i
        cdef int prot = PROT_READ | PROT_WRITE if writable else PROT_READ
        cdef void *host
        self._writable = writable
        self._slots = <Slot *>malloc(max(1, len(slots)) * sizeof(Slot))
        if self._slots == NULL:
            raise MemoryError
        for i, (gpa, size, fd, offset) in enumerate(slots):
            if os.fstat(fd).st_size < offset + size or size <= 0:
                raise ValueError(f"slot at GPA {gpa:#x} does not lie inside its RAM file")
            host = mmap(NULL, size, prot, MAP_SHARED, fd, offset)
            if host == MAP_FAILED:
                raise OSError(errno, os.strerror(errno))
            self._slots[i].gpa = gpa
            self._slots[i].size = size
            self._slots[i].host = <char *>host
            self._count = i + 1

    def __dealloc__(self):
        self._unmap()
        free(self._slots)

    cdef void _unmap(self) noexcept:
        cdef Py_ssize_t i
        for i in range(self._count):
            munmap(self._slots[i].host, self._slots[i].size)
        self._count = 0

    def close(self):
        if self._users:
            raise BufferError("guest RAM is being read or written by another thread")
        self._unmap()

    # ---- addresses -------------------------------------------------------------------------

    cdef char *_host(self, uint64_t gpa, uint64_t *available) noexcept nogil:
        # Host address of `gpa`, or NULL; `available` bytes follow it in the same slot.
        cdef Py_ssize_t i
        for i in range(self._count):
            if gpa >= self._slots[i].gpa and gpa - self._slots[i].gpa < self._slots[i].size:
                available[0] = self._slots[i].size - (gpa - self._slots[i].gpa)
                return self._slots[i].host + (gpa - self._slots[i].gpa)
        return NULL

    cdef const char *_table(self, uint64_t gpa) noexcept nogil:
        cdef uint64_t available = 0
        cdef char *host = self._host(gpa, &available)
        return host if host != NULL and available >= 4096 else NULL

    cdef bint _in_ram(self, uint64_t gpa, uint64_t size) noexcept nogil:
        cdef uint64_t available = 0
        while size:
            if self._host(gpa, &available) == NULL:
                return False
            if available >= size:
                return True
            gpa += available
            size -= available
        return True

    # ---- plain access ----------------------------------------------------------------------

    def read(self, uint64_t gpa, size_t size):
        self._check(gpa, size)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, size)
        cdef char *target = data
        cdef uint64_t part = 0
        cdef char *host
        while size:
            host = self._host(gpa, &part)
            part = min(part, size)
            memcpy(target, host, part)
            target += part
            gpa += part
            size -= part
        return data

    def write(self, uint64_t gpa, const uint8_t[::1] data not None):
        if not self._writable:
            raise PermissionError("guest RAM is mapped read-only")
        cdef size_t size = data.shape[0]
        cdef const uint8_t *source
        cdef uint64_t part = 0
        cdef char *host
        if size == 0:
            return
        self._check(gpa, size)
        source = &data[0]
        while size:
            host = self._host(gpa, &part)
            part = min(part, size)
            _store(host, source, part)
            source += part
            gpa += part
            size -= part

    def find(self, uint64_t gpa, uint64_t end, const uint8_t[::1] needle not None, size_t step):
        cdef uint64_t available = 0
        cdef char *host
        cdef char *hit
        cdef size_t size
        cdef size_t length = needle.shape[0]
        cdef const uint8_t *pattern
        if length == 0 or step == 0:
            raise ValueError("needle and step must not be empty")
        pattern = &needle[0]
        self._users += 1
        try:
            with nogil:
                host = self._host(gpa, &available)
                size = <size_t>min(available, end - gpa) if end > gpa and host != NULL else 0
                if step == 1:
                    hit = <char *>memmem(host, size, pattern, length)
                else:
                    hit = _find_stepped(host, size, pattern, length, step)
        finally:
            self._users -= 1
        return -1 if hit == NULL else gpa + <uint64_t>(hit - host)

    cdef _check(self, uint64_t gpa, uint64_t size):
        if gpa + size < gpa or not self._in_ram(gpa, size):
            raise GuestFault(f"guest physical range {gpa:#x}+{size:#x} is not RAM", gpa)

    # ---- page tables -----------------------------------------------------------------------

    def translate(self, uint64_t root, int levels, uint64_t gva):
        cdef uint64_t gpa = 0
        cdef uint64_t leaf = 0
        _check_levels(levels)
        if not self._translate(root, levels, gva, &gpa, &leaf):
            raise GuestFault(f"guest virtual address {gva:#x} is not mapped", gva)
        return gpa

    cdef bint _translate(
        self, uint64_t root, int levels, uint64_t gva, uint64_t *gpa, uint64_t *available
    ) noexcept nogil:
        # `available` bytes from `gva` on lie in the same leaf page.
        cdef int level = levels
        cdef uint64_t entry = root
        cdef uint64_t leaf
        cdef const char *table
        if not _canonical(gva, levels):
            return False
        while True:
            table = self._table(entry & PTE_ADDRESS)
            if table == NULL:
                return False
            entry = read_once(table + ((gva >> (12 + 9 * (level - 1))) & 511) * 8)
            if not entry & PTE_PRESENT:
                return False
            if level == 1 or (level <= 3 and entry & PTE_PSE):
                leaf = <uint64_t>1 << (12 + 9 * (level - 1))
                gpa[0] = (entry & PTE_ADDRESS & ~(leaf - 1)) + (gva & (leaf - 1))
                available[0] = leaf - (gva & (leaf - 1))
                return True
            level -= 1

    def walk(self, uint64_t root, int levels, const Piece[::1] pieces not None, frames=None):
        cdef Walk w
        cdef Frames f
        cdef Py_ssize_t i
        cdef int status = WALK_OK
        _check_levels(levels)
        _check_pieces(pieces, levels)
        memset(&w, 0, sizeof(w))
        if frames is not None:
            _load_frames(&f, frames)
            w.frames = &f
        self._users += 1
        try:
            with nogil:
                for i in range(pieces.shape[0]):
                    w.piece = pieces[i]
                    status = self._walk_table(
                        &w, root & PTE_ADDRESS, levels,
                        pieces[i].gva, pieces[i].gva + (pieces[i].size - 1),
                    )
                    if status != WALK_OK:
                        break
            if status == WALK_NOMEM:
                raise MemoryError
            if status == WALK_FAULT:
                raise GuestFault(
                    f"a guest page table at GPA {w.fault:#x} is damaged or not in RAM", w.fault
                )
            return _as_runs(&w)
        finally:
            self._users -= 1
            free(w.runs)

    cdef int _walk_table(
        self, Walk *w, uint64_t table_gpa, int level, uint64_t start, uint64_t last
    ) noexcept nogil:
        # mm/pagewalk.c, in one function for all levels: the MMU repeats itself. The range is
        # [start, last], so that one that ends with the address space needs no 65th bit.
        cdef const char *table = self._table(table_gpa)
        cdef int shift = 12 + 9 * (level - 1)
        cdef uint64_t below = (<uint64_t>1 << shift) - 1
        cdef uint64_t entry, part_last
        cdef int status
        if table == NULL:
            w.fault = table_gpa
            return WALK_FAULT
        while True:
            part_last = min(start | below, last)
            entry = read_once(table + ((start >> shift) & 511) * 8)
            status = WALK_OK
            if entry & PTE_PRESENT:
                if level == 1 or (entry & PTE_PSE and level <= 3):
                    status = self._leaf(w, entry, entry & PTE_ADDRESS, shift, start, part_last)
                elif entry & PTE_PSE:
                    w.fault = table_gpa
                    status = WALK_FAULT
                else:
                    status = self._walk_table(w, entry & PTE_ADDRESS, level - 1, start, part_last)
            elif entry & PTE_PROTNONE and (level == 1 or (level <= 3 and entry & PTE_PSE)):
                # PROT_NONE and NUMA-hinting entries keep their frame, with the address bits
                # inverted against L1TF (arch/x86/include/asm/pgtable-invert.h).
                status = self._leaf(w, entry, ~entry & PTE_ADDRESS, shift, start, part_last)
            if status != WALK_OK or part_last == last:
                return status
            start = part_last + 1

    cdef int _leaf(
        self, Walk *w, uint64_t entry, uint64_t frame, int shift, uint64_t start, uint64_t last
    ) noexcept nogil:
        cdef uint64_t inside = start & ((<uint64_t>1 << shift) - 1)
        cdef uint32_t flags = 0
        frame &= ~((<uint64_t>1 << shift) - 1)
        if entry & PTE_PRESENT:
            flags |= F_WRITE if entry & PTE_RW else 0
            flags |= F_USER if entry & PTE_USER else 0
        else:
            flags |= F_PROTNONE
        if w.frames != NULL and self._owned(w.frames, frame >> 12):
            flags |= F_OWNED
        return _emit(w, start, frame + inside, last - start + 1, flags, shift)

    cdef bint _owned(self, Frames *f, uint64_t pfn) noexcept nogil:
        # True if the kernel itself says what `frames` asks for: of an anonymous page that it
        # belongs to one process alone, of a page of shared memory which object it belongs to.
        cdef uint64_t gva = f.vmemmap + pfn * f.stride
        cdef char *page = self._page(f, gva)
        cdef uint64_t head
        if page == NULL or read_once(page + f.flags) & f.page_mask != f.page_mask:
            return False
        head = read_once(page + f.compound_head)
        if head & 1:
            # Newer kernels keep a mask there instead of the head's address, where a struct page
            # is 64 bytes (compound_info, in v7.1): its upper half is all ones, no address's is.
            if (head >> 32) == <uint64_t>0xFFFFFFFF:
                head &= gva
            page = self._page(f, head & ~<uint64_t>1)
            if page == NULL:
                return False
        return (
            read_once(page + f.flags) & f.folio_mask == f.folio_value
            and read_once(page + f.mapping) & f.mapping_mask == f.mapping_value
        )

    cdef char *_page(self, Frames *f, uint64_t gva) noexcept nogil:
        cdef uint64_t gpa = 0
        cdef uint64_t available = 0
        cdef uint64_t in_slot = 0
        cdef char *host
        if gva & 7:  # the guest says where a folio's head is
            return NULL
        if gva - f.cached_gva >= f.cached_size or f.cached_size - (gva - f.cached_gva) < f.stride:
            if not self._translate(f.root, f.levels, gva, &gpa, &available):
                return NULL
            host = self._host(gpa, &in_slot)
            available = min(available, in_slot)
            if host == NULL or available < f.stride:
                return NULL
            f.cached_gva = gva
            f.cached_size = available
            f.cached_host = host
        return f.cached_host + (gva - f.cached_gva)

    # ---- bulk ------------------------------------------------------------------------------

    def prefault(self, const Run[::1] runs not None):
        # Errors do not matter here: what is not prefaulted faults during the copy.
        cdef Py_ssize_t i
        cdef uint64_t available = 0
        cdef char *host
        cdef int advice = MADV_POPULATE_WRITE if self._writable else MADV_POPULATE_READ
        self._users += 1
        try:
            with nogil:
                for i in range(runs.shape[0]):
                    host = self._host(runs[i].gpa, &available)
                    if host != NULL:
                        madvise(
                            <void *>(<uint64_t>host & ~<uint64_t>4095),
                            min(available, runs[i].size), advice,
                        )
        finally:
            self._users -= 1

    def copy_in(self, const Run[::1] runs not None, const uint8_t[::1] source not None):
        if not self._writable:
            raise PermissionError("guest RAM is mapped read-only")
        self._check_runs(runs, source.shape[0])
        cdef uint64_t total = 0
        if runs.shape[0] == 0:
            return 0
        self._users += 1
        try:
            with nogil:
                total = self._copy(runs, &source[0])
        finally:
            self._users -= 1
        return total

    cdef uint64_t _copy(self, const Run[::1] runs, const uint8_t *source) noexcept nogil:
        cdef Py_ssize_t i
        cdef uint64_t gpa, left, part = 0, total = 0
        cdef const uint8_t *data
        cdef char *host
        for i in range(runs.shape[0]):
            gpa = runs[i].gpa
            left = runs[i].size
            data = source + runs[i].offset
            total += left
            while left:
                host = self._host(gpa, &part)
                part = min(part, left)
                memcpy(host, data, part)
                data += part
                gpa += part
                left -= part
        return total

    def first_difference(self, const Run[::1] runs not None, const uint8_t[::1] source not None):
        cdef Py_ssize_t i
        cdef int64_t at = -1
        self._check_runs(runs, source.shape[0])
        if runs.shape[0] == 0:
            return None
        self._users += 1
        try:
            with nogil:
                for i in range(runs.shape[0]):
                    at = self._differs(&runs[i], &source[0])
                    if at >= 0:
                        break
        finally:
            self._users -= 1
        return None if at < 0 else runs[i].gva + <uint64_t>at

    cdef int64_t _differs(self, const Run *run, const uint8_t *source) noexcept nogil:
        # Offset in the run of the first page-sized step that differs, or -1.
        cdef uint64_t done = 0, part = 0
        cdef char *host
        while done < run.size:
            host = self._host(run.gpa + done, &part)
            part = min(part, run.size - done, <uint64_t>4096)
            if memcmp(host, source + run.offset + done, part):
                return done
            done += part
        return -1

    cdef _check_runs(self, const Run[::1] runs, uint64_t source_size):
        # All of it before the first byte moves: a bad list must not leave a half-done copy.
        cdef Py_ssize_t i
        for i in range(runs.shape[0]):
            self._check(runs[i].gpa, runs[i].size)
            if (
                runs[i].offset < 0
                or runs[i].size > source_size
                or <uint64_t>runs[i].offset > source_size - runs[i].size
            ):
                raise ValueError(f"run at {runs[i].gva:#x} reaches past the end of its source")


def populate_read(const uint8_t[::1] source not None):
    cdef uint64_t start
    cdef int result
    if source.shape[0] == 0:
        return
    start = <uint64_t>&source[0]
    with nogil:
        result = madvise(
            <void *>(start & ~<uint64_t>4095), source.shape[0] + (start & 4095), MADV_POPULATE_READ
        )
    if result and errno not in (EAGAIN, EINTR):
        raise OSError(errno, os.strerror(errno))


def equal_pages(
    const uint8_t[::1] one not None, const uint8_t[::1] other not None,
    const Pair[::1] pairs not None
):
    cdef Py_ssize_t i
    cdef uint64_t done
    cdef uint64_t pages = 0
    cdef uint8_t[::1] view
    for i in range(pairs.shape[0]):
        _check_range(pairs[i].one, pairs[i].size, one.shape[0])
        _check_range(pairs[i].other, pairs[i].size, other.shape[0])
        pages += pairs[i].size >> 12
    equal = np.empty(pages, dtype=np.bool_)
    if pages == 0:
        return equal
    view = equal.view(np.uint8)
    pages = 0
    with nogil:
        for i in range(pairs.shape[0]):
            done = 0
            while done < pairs[i].size:
                view[pages] = memcmp(
                    &one[pairs[i].one] + done, &other[pairs[i].other] + done, 4096
                ) == 0
                pages += 1
                done += 4096
    return equal


cdef int _check_range(int64_t offset, uint64_t size, uint64_t source_size) except -1:
    if size & 4095 or not size:
        raise ValueError(f"{size} bytes at {offset} are not whole pages")
    if offset < 0 or size > source_size or <uint64_t>offset > source_size - size:
        raise ValueError(f"{size} bytes at {offset} reach past the end of their source")
    return 0


cdef void _store(char *host, const uint8_t *source, uint64_t size) noexcept nogil:
    # A kernel field must never be seen half-written: naturally aligned words go out in one store.
    if size == 8 and not <uint64_t>host & 7:
        (<uint64_t *>host)[0] = (<const uint64_t *>source)[0]
    elif size == 4 and not <uint64_t>host & 3:
        (<uint32_t *>host)[0] = (<const uint32_t *>source)[0]
    else:
        memcpy(host, source, size)


cdef char *_find_stepped(
    char *host, size_t size, const uint8_t *needle, size_t length, size_t step
) noexcept nogil:
    cdef size_t at = 0
    while at + length <= size:
        if memcmp(host + at, needle, length) == 0:
            return host + at
        at += step
    return NULL


cdef int _emit(
    Walk *w, uint64_t gva, uint64_t gpa, uint64_t size, uint32_t flags, uint32_t shift
) noexcept nogil:
    cdef Run *last
    cdef Run *grown
    cdef int64_t offset = w.piece.offset + <int64_t>(gva - w.piece.gva)
    if w.count:
        last = &w.runs[w.count - 1]
        if (
            last.gva + last.size == gva and last.gpa + last.size == gpa
            and last.offset + <int64_t>last.size == offset
            and last.flags == flags and last.page_shift == shift
        ):
            last.size += size
            return WALK_OK
    if w.count == w.capacity:
        w.capacity = max(<size_t>64, 2 * w.capacity)
        grown = <Run *>realloc(w.runs, w.capacity * sizeof(Run))
        if grown == NULL:
            return WALK_NOMEM
        w.runs = grown
    last = &w.runs[w.count]
    last.gva = gva
    last.gpa = gpa
    last.size = size
    last.offset = offset
    last.flags = flags
    last.page_shift = shift
    w.count += 1
    return WALK_OK


cdef object _as_runs(Walk *w):
    cdef Run[::1] view
    runs = np.empty(w.count, dtype=RUN)
    if w.count:
        view = runs
        memcpy(&view[0], w.runs, w.count * sizeof(Run))
    return runs


cdef int _check_levels(int levels) except -1:
    if levels not in (4, 5):
        raise ValueError(f"x86-64 page tables have 4 or 5 levels, not {levels}")
    return 0


cdef inline bint _canonical(uint64_t gva, int levels) noexcept nogil:
    # Bits above the translated ones repeat the highest translated one.
    cdef int unused = 64 - (12 + 9 * levels)
    return <uint64_t>((<int64_t>(gva << unused)) >> unused) == gva


cdef int _check_pieces(const Piece[::1] pieces, int levels) except -1:
    cdef Py_ssize_t i
    cdef uint64_t gva, last
    for i in range(pieces.shape[0]):
        gva = pieces[i].gva
        last = gva + pieces[i].size - 1
        if (gva | pieces[i].size) & 4095 or not pieces[i].size:
            raise ValueError(f"piece at {gva:#x} is not a range of whole pages")
        if last < gva or not (_canonical(gva, levels) and _canonical(last, levels)):
            raise GuestFault(f"{gva:#x}+{pieces[i].size:#x} is not a canonical range", gva)
    return 0


cdef int _load_frames(Frames *f, frames) except -1:
    memset(f, 0, sizeof(f[0]))
    f.root = frames.root
    f.levels = frames.levels
    f.vmemmap = frames.vmemmap
    f.stride = frames.stride
    f.flags = frames.flags
    f.mapping = frames.mapping
    f.compound_head = frames.compound_head
    f.page_mask = frames.page_mask
    f.folio_mask = frames.folio_mask
    f.folio_value = frames.folio_value
    f.mapping_mask = frames.mapping_mask
    f.mapping_value = frames.mapping_value
    _check_levels(f.levels)
    if not 8 <= f.stride <= 4096 or (f.vmemmap | f.stride) & 7 or not f.mapping_mask:
        raise ValueError("this is no usable description of a struct page array")
    if max(f.flags, f.mapping, f.compound_head) + 8 > f.stride:
        raise ValueError("a member of struct page lies outside of it")
    return 0
