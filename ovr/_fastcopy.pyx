# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, embedsignature=False
"""The native loops: map guest RAM, walk page tables, copy and compare pages.

The contract of every function is in `_fastcopy.pyi`. Everything read from guest memory is a
claim, not a fact: an address counts only after `_host` found it inside a slot.
"""

import os

import numpy as np

from libc.errno cimport EFAULT, EINTR, EIO, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, madvise, mmap, munmap

from ovr.errors import GuestFault, RamNotShared

cdef extern from "_guard.h":
    void ovr_guard_install() noexcept
    void *ovr_guarded(void (*)(void *) noexcept nogil, void *) noexcept nogil

cdef extern from *:
    """
    #include <string.h>
    #include <stdint.h>
    #include <unistd.h>
    #include <sys/syscall.h>

    #ifndef SYS_cachestat
    #define SYS_cachestat 451 /* in v6.5 */
    #endif

    /* How many pages of a range of a file are in the page cache; -1 if the kernel cannot tell. */
    static inline int64_t ovr_cached_pages(int fd, uint64_t offset, uint64_t size)
    {
        uint64_t range[2] = {offset, size}, found[5];

        return syscall(SYS_cachestat, fd, range, found, 0u) ? -1 : (int64_t)found[0];
    }

    /* The guest may change any word while we look at it: read it once, whole. */
    static inline uint64_t ovr_read_once(const void *p)
    {
        return __atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED);
    }

    static inline void ovr_prefetch(const void *p)
    {
        __builtin_prefetch(p);
    }

    /* What was stored before is in memory if guarded work is left after it. */
    static inline void ovr_settle(void)
    {
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
    }
    """
    uint64_t read_once "ovr_read_once"(const void *) noexcept nogil
    void prefetch "ovr_prefetch"(const void *) noexcept nogil
    void settle "ovr_settle"() noexcept nogil
    int64_t cached_pages "ovr_cached_pages"(int, uint64_t, uint64_t) noexcept nogil
    void *memmem(const void *, size_t, const void *, size_t) noexcept nogil

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

    ssize_t preadv(int, const iovec *, int, int64_t)

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

CUT_OFF = "it was cut off while it was read"

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

cdef struct Ram:
    Slot *slots
    Py_ssize_t count

cdef enum:
    # Struct pages of scattered frames are scattered: translations of the array, a large page
    # each, are remembered, enough for 128 GiB of guest RAM.
    VMEMMAP_SHIFT = 21
    VMEMMAP_PIECES = 1024
    # How many page table entries ahead a struct page is fetched: a miss takes as long as some.
    FETCH_AHEAD = 48

    # Bytes for which a system call is worth it, when host pages are mapped ahead.
    WORTH_ADVICE = 65536

    # UIO_MAXIOV of include/uapi/linux/uio.h
    MAX_VECTORS = 1024

cdef struct Vmemmap:
    uint64_t gva
    char *host              # NULL: not known

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
    Vmemmap known[VMEMMAP_PIECES]

cdef struct Walk:
    const Ram *ram
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

# Guarded work: what it is given, and what it leaves.

cdef struct Bytes:
    const Ram *ram
    uint64_t gpa
    uint64_t size
    char *target
    const uint8_t *source

cdef struct Search:
    const Ram *ram
    uint64_t gpa
    uint64_t end
    const uint8_t *needle
    size_t length
    size_t step
    uint64_t found          # not below `end` if there is none

cdef struct Translation:
    const Ram *ram
    uint64_t root
    int levels
    uint64_t gva
    uint64_t gpa
    uint64_t available      # bytes from `gva` on that lie in the same leaf page
    bint there

cdef struct Walking:
    Walk walk
    uint64_t root
    int levels
    const Piece *pieces
    Py_ssize_t count
    int status

cdef struct Matching:
    const Ram *ram
    const Run *runs
    Py_ssize_t count
    const uint8_t *source
    Py_ssize_t which        # the run that differs, `count` if none does
    int64_t at              # where in it

cdef struct Reading:
    const Ram *ram
    const Run *runs
    Py_ssize_t count
    int fd
    int64_t base            # where in the file the source begins
    Py_ssize_t at           # the run that is next, and how much of it is done
    uint64_t done
    int error               # an errno; EFAULT is of guest RAM
    void *lost              # what could not be written to, then
    iovec vectors[MAX_VECTORS]

cdef struct Mapping:
    const Ram *ram
    const Run *runs
    Py_ssize_t count
    int advice
    uint64_t seen           # so that no compiler leaves out to look

cdef struct Comparing:
    const uint8_t *one
    const uint8_t *other
    const Pair *pairs
    Py_ssize_t count
    uint8_t *equal


cdef class RamMap:
    cdef Ram _ram
    cdef bint _writable
    cdef int _users

    def __cinit__(self, slots, *, bint writable):
        cdef Py_ssize_t i
        cdef int prot = PROT_READ | PROT_WRITE if writable else PROT_READ
        cdef void *host
        self._writable = writable
        self._ram.slots = <Slot *>malloc(max(1, len(slots)) * sizeof(Slot))
        if self._ram.slots == NULL:
            raise MemoryError
        for i, (gpa, size, fd, offset) in enumerate(slots):
            if os.fstat(fd).st_size < offset + size or size <= 0:
                raise ValueError(f"slot at GPA {gpa:#x} does not lie inside its RAM file")
            host = mmap(NULL, size, prot, MAP_SHARED, fd, offset)
            if host == MAP_FAILED:
                raise OSError(errno, os.strerror(errno))
            self._ram.slots[i].gpa = gpa
            self._ram.slots[i].size = size
            self._ram.slots[i].host = <char *>host
            self._ram.count = i + 1
        ovr_guard_install()

    def __dealloc__(self):
        self._unmap()
        free(self._ram.slots)

    cdef void _unmap(self) noexcept:
        cdef Py_ssize_t i
        for i in range(self._ram.count):
            munmap(self._ram.slots[i].host, self._ram.slots[i].size)
        self._ram.count = 0

    def close(self):
        if self._users:
            raise BufferError("guest RAM is being read or written by another thread")
        self._unmap()

    # ---- plain access ----------------------------------------------------------------------

    def read(self, uint64_t gpa, size_t size):
        cdef Bytes job
        self._check(gpa, size)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, size)
        job.ram, job.gpa, job.size, job.target = &self._ram, gpa, size, data
        self._done(ovr_guarded(_read, &job))
        return data

    def write(self, uint64_t gpa, const uint8_t[::1] data not None):
        cdef Bytes job
        if not self._writable:
            raise PermissionError("guest RAM is mapped read-only")
        if data.shape[0] == 0:
            return
        self._check(gpa, data.shape[0])
        job.ram, job.gpa, job.size, job.source = &self._ram, gpa, data.shape[0], &data[0]
        self._done(ovr_guarded(_write, &job))

    def find(self, uint64_t gpa, uint64_t end, const uint8_t[::1] needle not None, size_t step):
        cdef Search job
        cdef void *lost
        job.length = needle.shape[0]
        if job.length == 0 or step == 0:
            raise ValueError("needle and step must not be empty")
        job.ram, job.gpa, job.end, job.needle, job.step = &self._ram, gpa, end, &needle[0], step
        self._begin()
        try:
            with nogil:
                lost = ovr_guarded(_find, &job)
            self._done(lost)
        finally:
            self._users -= 1
        return job.found if job.found < end else -1

    cdef _check(self, uint64_t gpa, uint64_t size):
        if gpa + size < gpa or not _in_ram(&self._ram, gpa, size):
            raise GuestFault(f"guest physical range {gpa:#x}+{size:#x} is not RAM", gpa)

    cdef void _begin(self) noexcept:
        # Before a loop; whoever calls this counts `_users` down again.
        self._users += 1
        ovr_guard_install()

    cdef int _done(self, void *lost) except -1:
        # `lost` is what guarded work could not touch: guest RAM, or else its source.
        cdef Py_ssize_t i
        cdef uint64_t offset
        if lost == NULL:
            return 0
        for i in range(self._ram.count):
            offset = <uint64_t>lost - <uint64_t>self._ram.slots[i].host
            if offset < self._ram.slots[i].size:
                raise RamNotShared(
                    f"guest RAM at GPA {self._ram.slots[i].gpa + offset:#x} is gone: its file was"
                    " cut off",
                    "end the VM: it cannot go on without its RAM",
                )
        raise OSError(EIO, CUT_OFF)

    # ---- page tables -----------------------------------------------------------------------

    def translate(self, uint64_t root, int levels, uint64_t gva):
        cdef Translation job
        _check_levels(levels)
        job.ram, job.root, job.levels, job.gva = &self._ram, root, levels, gva
        self._done(ovr_guarded(_translating, &job))
        if not job.there:
            raise GuestFault(f"guest virtual address {gva:#x} is not mapped", gva)
        return job.gpa

    def walk(self, uint64_t root, int levels, const Piece[::1] pieces not None, frames=None):
        cdef Walking job
        cdef Frames f
        cdef void *lost
        _check_levels(levels)
        _check_pieces(pieces, levels)
        memset(&job, 0, sizeof(job))
        if frames is not None:
            _load_frames(&f, frames)
            job.walk.frames = &f
        job.walk.ram, job.root, job.levels, job.count = &self._ram, root, levels, pieces.shape[0]
        job.pieces = &pieces[0] if pieces.shape[0] else NULL
        self._begin()
        try:
            with nogil:
                lost = ovr_guarded(_walk, &job)
            self._done(lost)
            if job.status == WALK_NOMEM:
                raise MemoryError
            if job.status == WALK_FAULT:
                raise GuestFault(
                    f"a guest page table at GPA {job.walk.fault:#x} is damaged or not in RAM",
                    job.walk.fault,
                )
            return _as_runs(&job.walk)
        finally:
            self._users -= 1
            free(job.walk.runs)

    # ---- bulk ------------------------------------------------------------------------------

    def prefault(self, const Run[::1] runs not None):
        cdef Mapping job
        cdef void *lost = NULL
        if runs.shape[0] == 0:
            return
        job.ram = &self._ram
        job.runs = &runs[0]
        job.count = runs.shape[0]
        job.seen = 0
        job.advice = MADV_POPULATE_WRITE if self._writable else MADV_POPULATE_READ
        self._users += 1
        try:
            with nogil:
                lost = ovr_guarded(_map, &job)
        finally:
            self._users -= 1
        self._done(lost)

    def copy_in(self, const Run[::1] runs not None, int fd, int64_t base, int64_t size):
        cdef Reading job
        cdef Py_ssize_t i
        cdef uint64_t total = 0
        if not self._writable:
            raise PermissionError("guest RAM is mapped read-only")
        if base < 0 or size < 0 or base + size < base:
            raise ValueError(f"{size} bytes at {base} are not a range of a file")
        self._check_runs(runs, size)
        if runs.shape[0] == 0:
            return 0
        for i in range(runs.shape[0]):
            total += runs[i].size
        job.ram, job.runs, job.count = &self._ram, &runs[0], runs.shape[0]
        job.fd, job.base, job.at, job.done, job.error, job.lost = fd, base, 0, 0, 0, NULL
        self._users += 1
        try:
            with nogil:
                _copy_in(&job)
        finally:
            self._users -= 1
        if job.error == EFAULT:
            self._done(job.lost)
        if job.error:
            raise OSError(job.error, CUT_OFF if job.error == EIO else os.strerror(job.error))
        return total

    def first_difference(self, const Run[::1] runs not None, const uint8_t[::1] source not None):
        cdef Matching job
        self._on_runs(&job, _differ, runs, source)
        return None if job.which == job.count else runs[job.which].gva + <uint64_t>job.at

    cdef _on_runs(
        self, Matching *job, void (*work)(void *) noexcept nogil, const Run[::1] runs,
        const uint8_t[::1] source
    ):
        cdef void *lost
        self._check_runs(runs, source.shape[0])
        memset(job, 0, sizeof(job[0]))
        job.ram, job.count = &self._ram, runs.shape[0]
        if runs.shape[0] == 0:
            return
        job.runs = &runs[0]
        job.source = &source[0]
        self._begin()
        try:
            with nogil:
                lost = ovr_guarded(work, job)
            self._done(lost)
        finally:
            self._users -= 1

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


# ---- addresses -----------------------------------------------------------------------------


cdef char *_host(const Ram *ram, uint64_t gpa, uint64_t *available) noexcept nogil:
    # Host address of `gpa`, or NULL; `available` bytes follow it in the same slot.
    cdef Py_ssize_t i
    for i in range(ram.count):
        if gpa >= ram.slots[i].gpa and gpa - ram.slots[i].gpa < ram.slots[i].size:
            available[0] = ram.slots[i].size - (gpa - ram.slots[i].gpa)
            return ram.slots[i].host + (gpa - ram.slots[i].gpa)
    return NULL


cdef const char *_table(const Ram *ram, uint64_t gpa) noexcept nogil:
    cdef uint64_t available = 0
    cdef char *host = _host(ram, gpa, &available)
    return host if host != NULL and available >= 4096 else NULL


cdef bint _in_ram(const Ram *ram, uint64_t gpa, uint64_t size) noexcept nogil:
    cdef uint64_t available = 0
    while size:
        if _host(ram, gpa, &available) == NULL:
            return False
        if available >= size:
            return True
        gpa += available
        size -= available
    return True


# ---- guarded work: plain access ------------------------------------------------------------


cdef void _read(void *given) noexcept nogil:
    cdef Bytes *job = <Bytes *>given
    cdef uint64_t part = 0
    cdef char *host
    while job.size:
        host = _host(job.ram, job.gpa, &part)
        part = min(part, job.size)
        memcpy(job.target, host, part)
        job.target += part
        job.gpa += part
        job.size -= part


cdef void _write(void *given) noexcept nogil:
    cdef Bytes *job = <Bytes *>given
    cdef uint64_t part = 0
    cdef char *host
    while job.size:
        host = _host(job.ram, job.gpa, &part)
        part = min(part, job.size)
        _store(host, job.source, part)
        job.source += part
        job.gpa += part
        job.size -= part


cdef void _find(void *given) noexcept nogil:
    cdef Search *job = <Search *>given
    cdef uint64_t available = 0
    cdef char *hit
    cdef char *host = _host(job.ram, job.gpa, &available)
    cdef size_t size = 0
    if job.end > job.gpa and host != NULL:
        size = <size_t>min(available, job.end - job.gpa)
    if job.step == 1:
        hit = <char *>memmem(host, size, job.needle, job.length)
    else:
        hit = _find_stepped(host, size, job.needle, job.length, job.step)
    job.found = job.end if hit == NULL else job.gpa + <uint64_t>(hit - host)


# ---- guarded work: page tables -------------------------------------------------------------


cdef void _translating(void *given) noexcept nogil:
    cdef Translation *job = <Translation *>given
    job.there = _translate(
        job.ram, job.root, job.levels, job.gva, &job.gpa, &job.available
    )


cdef bint _translate(
    const Ram *ram, uint64_t root, int levels, uint64_t gva, uint64_t *gpa, uint64_t *available
) noexcept nogil:
    # `available` bytes from `gva` on lie in the same leaf page.
    cdef int level = levels
    cdef uint64_t entry = root
    cdef uint64_t leaf
    cdef const char *table
    if not _canonical(gva, levels):
        return False
    while True:
        table = _table(ram, entry & PTE_ADDRESS)
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


cdef void _walk(void *given) noexcept nogil:
    cdef Walking *job = <Walking *>given
    cdef Py_ssize_t i
    for i in range(job.count):
        job.walk.piece = job.pieces[i]
        job.status = _walk_table(
            &job.walk, job.root & PTE_ADDRESS, job.levels,
            job.pieces[i].gva, job.pieces[i].gva + (job.pieces[i].size - 1),
        )
        if job.status != WALK_OK:
            return


cdef int _walk_table(
    Walk *w, uint64_t table_gpa, int level, uint64_t start, uint64_t last
) noexcept nogil:
    # mm/pagewalk.c, in one function for all levels: the MMU repeats itself. The range is
    # [start, last], so that one that ends with the address space needs no 65th bit.
    cdef const char *table = _table(w.ram, table_gpa)
    cdef int shift = 12 + 9 * (level - 1)
    cdef uint64_t below = (<uint64_t>1 << shift) - 1
    cdef uint64_t entry, part_last
    cdef int status
    if table == NULL:
        w.fault = table_gpa
        return WALK_FAULT
    if level == 1:
        return _walk_pages(w, table, start, last)
    while True:
        part_last = min(start | below, last)
        entry = read_once(table + ((start >> shift) & 511) * 8)
        status = WALK_OK
        if entry & PTE_PRESENT:
            if entry & PTE_PSE and level <= 3:
                status = _leaf(w, entry, entry & PTE_ADDRESS, shift, start, part_last)
            elif entry & PTE_PSE:
                w.fault = table_gpa
                status = WALK_FAULT
            else:
                status = _walk_table(w, entry & PTE_ADDRESS, level - 1, start, part_last)
        elif entry & PTE_PROTNONE and level <= 3 and entry & PTE_PSE:
            # PROT_NONE and NUMA-hinting entries keep their frame, with the address bits
            # inverted against L1TF (arch/x86/include/asm/pgtable-invert.h).
            status = _leaf(w, entry, ~entry & PTE_ADDRESS, shift, start, part_last)
        if status != WALK_OK or part_last == last:
            return status
        start = part_last + 1


cdef int _walk_pages(
    Walk *w, const char *table, uint64_t start, uint64_t last
) noexcept nogil:
    # The lowest level, where nearly all entries are: `start` and `last` lie in this table.
    cdef uint64_t at = (start >> 12) & 511
    cdef uint64_t end = (last >> 12) & 511
    cdef uint64_t entry
    cdef int status = WALK_OK
    while at <= end and status == WALK_OK:
        if w.frames != NULL and at + FETCH_AHEAD <= end:
            _fetch(w.frames, read_once(table + (at + FETCH_AHEAD) * 8))
        entry = read_once(table + at * 8)
        if entry & PTE_PRESENT:
            status = _leaf(w, entry, entry & PTE_ADDRESS, 12, start, start | 4095)
        elif entry & PTE_PROTNONE:
            status = _leaf(w, entry, ~entry & PTE_ADDRESS, 12, start, start | 4095)
        start += 4096
        at += 1
    return status


cdef int _leaf(
    Walk *w, uint64_t entry, uint64_t frame, int shift, uint64_t start, uint64_t last
) noexcept nogil:
    cdef uint64_t inside = start & ((<uint64_t>1 << shift) - 1)
    cdef uint32_t flags = 0
    frame &= ~((<uint64_t>1 << shift) - 1)
    if entry & PTE_PRESENT:
        flags |= F_WRITE if entry & PTE_RW else 0
        flags |= F_USER if entry & PTE_USER else 0
    else:
        flags |= F_PROTNONE
    if w.frames != NULL and _owned(w.ram, w.frames, frame >> 12):
        flags |= F_OWNED
    return _emit(w, start, frame + inside, last - start + 1, flags, shift)


cdef bint _owned(const Ram *ram, Frames *f, uint64_t pfn) noexcept nogil:
    # True if the kernel itself says what `frames` asks for: of an anonymous page that it
    # belongs to one process alone, of a page of shared memory which object it belongs to.
    cdef uint64_t gva = f.vmemmap + pfn * f.stride
    cdef char *page = _page(ram, f, gva)
    cdef uint64_t head
    if page == NULL or read_once(page + f.flags) & f.page_mask != f.page_mask:
        return False
    head = read_once(page + f.compound_head)
    if head & 1:
        # Newer kernels keep a mask there instead of the head's address, where a struct page
        # is 64 bytes (compound_info, in v7.1): its upper half is all ones, no address's is.
        if (head >> 32) == <uint64_t>0xFFFFFFFF:
            head &= gva
        page = _page(ram, f, head & ~<uint64_t>1)
        if page == NULL:
            return False
    return (
        read_once(page + f.flags) & f.folio_mask == f.folio_value
        and read_once(page + f.mapping) & f.mapping_mask == f.mapping_value
    )


cdef char *_page(const Ram *ram, Frames *f, uint64_t gva) noexcept nogil:
    cdef uint64_t piece = <uint64_t>1 << VMEMMAP_SHIFT
    cdef uint64_t inside = gva & (piece - 1)
    cdef Vmemmap *known = &f.known[(gva >> VMEMMAP_SHIFT) & (VMEMMAP_PIECES - 1)]
    cdef uint64_t gpa = 0
    cdef uint64_t available = 0
    cdef uint64_t in_slot = 0
    cdef char *host
    if gva & 7:  # the guest says where a folio's head is
        return NULL
    if known.host != NULL and known.gva == gva - inside and piece - inside >= f.stride:
        return known.host + inside
    if not _translate(ram, f.root, f.levels, gva, &gpa, &available):
        return NULL
    host = _host(ram, gpa, &in_slot)
    if host == NULL or min(available, in_slot) < f.stride:
        return NULL
    # Remembered only if all of the piece is in one page of the guest, and in one slot.
    if available + inside >= piece and gpa >= inside:
        if _host(ram, gpa - inside, &in_slot) == host - inside and in_slot >= piece:
            known.gva = gva - inside
            known.host = host - inside
    return host


cdef void _fetch(Frames *f, uint64_t entry) noexcept nogil:
    # Only where a known piece is: a guess that is wrong or missing costs a little time.
    cdef uint64_t gva = f.vmemmap + ((entry & PTE_ADDRESS) >> 12) * f.stride
    cdef uint64_t inside = gva & ((<uint64_t>1 << VMEMMAP_SHIFT) - 1)
    cdef Vmemmap *known = &f.known[(gva >> VMEMMAP_SHIFT) & (VMEMMAP_PIECES - 1)]
    if known.host != NULL and known.gva == gva - inside:
        prefetch(known.host + inside)


# ---- guarded work: bulk --------------------------------------------------------------------


cdef void _map(void *given) noexcept nogil:
    # Errors do not matter here: what is not mapped ahead faults during the copy.
    cdef Mapping *job = <Mapping *>given
    cdef Py_ssize_t i
    cdef uint64_t size, at
    cdef uint64_t available = 0
    cdef char *host
    for i in range(job.count):
        host = _host(job.ram, job.runs[i].gpa, &available)
        if host == NULL:
            continue
        host = <char *>(<uint64_t>host & ~<uint64_t>4095)
        size = min(available, job.runs[i].size)
        if size >= WORTH_ADVICE:
            madvise(host, size, job.advice)
            continue
        # To look at a page maps it, of a shared file for writing too, and is faster than a system
        # call where it is mapped already, as are most in RAM files of large pages.
        at = 0
        while at < size:
            job.seen ^= read_once(host + at)
            at += 4096


cdef void _copy_in(Reading *job) noexcept nogil:
    # The kernel copies from its page cache to the RAM file: no page of the source is mapped here,
    # which costs as much as half of the copy, and what is cut off is an error instead of a signal.
    cdef int64_t start = 0
    cdef ssize_t got
    cdef size_t part
    cdef int count, i
    while job.at < job.count:
        count = _gather(job, &start)
        i = 0
        while i < count:
            got = preadv(job.fd, &job.vectors[i], count - i, job.base + start)
            if got <= 0:
                if got < 0 and errno == EINTR:
                    continue
                job.error = EIO if got == 0 else errno
                job.lost = job.vectors[i].iov_base
                return
            start += got
            while got > 0:
                part = min(<size_t>got, job.vectors[i].iov_len)
                job.vectors[i].iov_base = <char *>job.vectors[i].iov_base + part
                job.vectors[i].iov_len -= part
                got -= part
                if job.vectors[i].iov_len == 0:
                    i += 1


cdef int _gather(Reading *job, int64_t *start) noexcept nogil:
    # Where the next bytes of the source go, as long as they follow each other there.
    cdef const Run *run = &job.runs[job.at]
    cdef int64_t at = run.offset + <int64_t>job.done
    cdef uint64_t part = 0
    cdef char *host
    cdef char *end = NULL       # of the last vector
    cdef int count = 0
    start[0] = at
    while job.at < job.count:
        run = &job.runs[job.at]
        if run.offset + <int64_t>job.done != at:
            break
        if job.done < run.size:
            host = _host(job.ram, run.gpa + job.done, &part)
            part = min(part, run.size - job.done)
            if count and host == end:
                job.vectors[count - 1].iov_len += part
            elif count == MAX_VECTORS:
                break
            else:
                job.vectors[count].iov_base = host
                job.vectors[count].iov_len = part
                count += 1
            end = host + part
            job.done += part
            at += part
        if job.done == run.size:
            job.at += 1
            job.done = 0
    return count


cdef void _differ(void *given) noexcept nogil:
    cdef Matching *job = <Matching *>given
    for job.which in range(job.count):
        job.at = _differs(job.ram, &job.runs[job.which], job.source)
        if job.at >= 0:
            return
    job.which = job.count


cdef void _compare(void *given) noexcept nogil:
    cdef Comparing *job = <Comparing *>given
    cdef Py_ssize_t i
    cdef uint64_t done
    cdef uint8_t *equal = job.equal
    for i in range(job.count):
        done = 0
        while done < job.pairs[i].size:
            equal[0] = memcmp(
                job.one + job.pairs[i].one + done, job.other + job.pairs[i].other + done, 4096
            ) == 0
            equal += 1
            done += 4096


cdef int64_t _differs(const Ram *ram, const Run *run, const uint8_t *source) noexcept nogil:
    # Offset in the run of the first page-sized step that differs, or -1.
    cdef uint64_t done = 0, part = 0
    cdef char *host
    while done < run.size:
        host = _host(ram, run.gpa + done, &part)
        part = min(part, run.size - done, <uint64_t>4096)
        if memcmp(host, source + run.offset + done, part):
            return done
        done += part
    return -1


def in_page_cache(int fd, int64_t offset, int64_t size):
    cdef int64_t first = offset & ~<int64_t>4095
    if size <= 0 or offset < 0:
        raise ValueError(f"{size} bytes at {offset} are not a range of a file")
    return cached_pages(fd, first, size + offset - first) == (size + offset - first + 4095) >> 12


def equal_pages(
    const uint8_t[::1] one not None, const uint8_t[::1] other not None,
    const Pair[::1] pairs not None
):
    cdef Comparing job
    cdef Py_ssize_t i
    cdef uint64_t pages = 0
    cdef uint8_t[::1] view
    cdef void *lost
    for i in range(pairs.shape[0]):
        _check_range(pairs[i].one, pairs[i].size, one.shape[0])
        _check_range(pairs[i].other, pairs[i].size, other.shape[0])
        pages += pairs[i].size >> 12
    equal = np.empty(pages, dtype=np.bool_)
    if pages == 0:
        return equal
    view = equal.view(np.uint8)
    job.one, job.other, job.equal = &one[0], &other[0], &view[0]
    job.pairs, job.count = &pairs[0], pairs.shape[0]
    ovr_guard_install()
    with nogil:
        lost = ovr_guarded(_compare, &job)
    if lost != NULL:
        raise OSError(EIO, CUT_OFF)
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
        settle()  # the old one is freed
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
