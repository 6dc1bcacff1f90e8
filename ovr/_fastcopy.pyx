# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, embedsignature=False
"""The native loops: map guest RAM, walk page tables, copy and compare pages.

The contract of every function is in `_fastcopy.pyi`. Here are the arguments checked and the GIL
given up; the loops themselves are in the files of `native/`.
"""

import os

import numpy as np

from libc.errno cimport EAGAIN, EFAULT, EINTR, EIO, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, madvise, mmap, munmap

from ovr.errors import GuestFault, HoldBroken, RamNotShared

include "native/external.pxi"
include "native/hold.pxi"
include "native/ram.pxi"
include "native/walk.pxi"
include "native/bulk.pxi"

WRITE = F_WRITE
USER = F_USER
PROTNONE = F_PROTNONE
OWNED = F_OWNED
SOFT_DIRTY = F_SOFT_DIRTY

CUT_OFF = "it was cut off while it was read"

PIECE = np.dtype([("gva", "<u8"), ("size", "<u8"), ("offset", "<i8")])
RUN = np.dtype(
    [("gva", "<u8"), ("gpa", "<u8"), ("size", "<u8"), ("offset", "<i8"),
     ("flags", "<u4"), ("page_shift", "<u4")]
)
PAIR = np.dtype([("one", "<i8"), ("other", "<i8"), ("size", "<u8")])


cdef class RamMap:
    cdef Ram _ram
    cdef bint _writable
    cdef bint _unheld
    cdef int _users
    cdef Hold _hold

    def __cinit__(self, slots, *, bint writable, bint unheld=False):
        cdef Py_ssize_t i
        cdef int prot = PROT_READ | PROT_WRITE if writable else PROT_READ
        cdef int around
        cdef uint64_t unit, start, length
        cdef void *mapping
        self._writable = writable
        self._unheld = unheld
        self._ram.slots = <Slot *>malloc(max(1, len(slots)) * sizeof(Slot))
        if self._ram.slots == NULL:
            raise MemoryError
        for i, (gpa, size, fd, offset) in enumerate(slots):
            file = os.fstat(fd)
            if file.st_size < offset + size or size <= 0:
                raise ValueError(f"slot at GPA {gpa:#x} does not lie inside its RAM file")
            # Firmware cuts RAM below 1 MiB into slots of small pages, and a hugetlbfs maps whole
            # huge ones only: the mapping may extend beyond the slot, where nothing accesses it.
            unit = mapping_unit(fd)
            if unit == 0:
                raise OSError(errno, os.strerror(errno))
            start = offset // unit * unit
            length = (offset + size + unit - 1) // unit * unit - start
            mapping = mmap(NULL, length, prot, MAP_SHARED, fd, start)
            if mapping == MAP_FAILED:
                raise OSError(errno, os.strerror(errno))
            self._ram.slots[i].mapping = mapping
            self._ram.slots[i].mapped = length
            self._ram.slots[i].gpa = gpa
            self._ram.slots[i].size = size
            self._ram.slots[i].host = <char *>mapping + (<uint64_t>offset - start)
            # hugetlbfs, and tmpfs if its pages are to be huge, say so here.
            around = HUGE_SHIFT if file.st_blksize >= 1 << HUGE_SHIFT else AROUND_SHIFT
            self._ram.slots[i].around_shift = around
            self._ram.slots[i].looked = <uint8_t *>calloc((size >> around) + 2, 1)
            self._ram.count = i + 1
            if self._ram.slots[i].looked == NULL:
                raise MemoryError
        ovr_guard_install()

    def __dealloc__(self):
        self._unmap()
        free(self._ram.slots)

    cdef void _unmap(self) noexcept:
        cdef Py_ssize_t i
        for i in range(self._ram.count):
            munmap(self._ram.slots[i].mapping, self._ram.slots[i].mapped)
            free(self._ram.slots[i].looked)
        self._ram.count = 0

    def close(self):
        if self._users:
            raise BufferError("guest RAM is being read or written by another thread")
        self._unmap()

    def govern(self, Hold hold):
        if self._users:
            raise BufferError("guest RAM is being read or written by another thread")
        self._hold = hold

    cdef HoldPage *_gate(self) except? NULL:
        # Writers must enter it; NULL only where writes need no hold.
        if not self._writable:
            raise PermissionError("guest RAM is mapped read-only")
        if self._hold is not None:
            return self._hold._hold.page
        if not self._unheld:
            _entered(GATE_IS_SHUT)
        return NULL

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
        cdef HoldPage *gate = self._gate()
        cdef uint32_t generation = 0
        cdef void *lost
        if data.shape[0] == 0:
            return
        self._check(gpa, data.shape[0])
        job.ram, job.gpa, job.size, job.source = &self._ram, gpa, data.shape[0], &data[0]
        _entered(gate_enter(gate, &generation))
        lost = ovr_guarded(_write, &job)
        gate_leave(gate)
        self._done(lost)

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
        # Call it before a loop; the caller decrements `_users` afterwards.
        self._users += 1
        ovr_guard_install()

    cdef int _done(self, void *lost, RamMap other=None) except -1:
        # `lost` is the address of a failed access of guarded work: in guest RAM, or in its source.
        if lost == NULL:
            return 0
        self._check_file(lost)
        if other is not None:
            other._check_file(lost)
        raise OSError(EIO, CUT_OFF)

    cdef int _check_file(self, void *lost) except -1:
        cdef Py_ssize_t i
        cdef uint64_t offset
        for i in range(self._ram.count):
            offset = <uint64_t>lost - <uint64_t>self._ram.slots[i].host
            if offset < self._ram.slots[i].size:
                raise RamNotShared(
                    f"guest RAM at GPA {self._ram.slots[i].gpa + offset:#x} is gone: its file was"
                    " cut off",
                    "end the VM: it cannot go on without its RAM",
                )
        return 0

    # ---- page tables -----------------------------------------------------------------------

    def translate(self, uint64_t root, int levels, uint64_t gva):
        cdef Translation job
        _check_levels(levels)
        job.ram, job.root, job.levels, job.gva = &self._ram, root, levels, gva
        self._done(ovr_guarded(_translating, &job))
        if not job.there:
            raise GuestFault(f"guest virtual address {gva:#x} is not mapped", gva)
        return job.gpa

    def walk(
        self, uint64_t root, int levels, const Piece[::1] pieces not None, frames=None,
        *, bint soft_dirty=False
    ):
        cdef Walking job
        cdef Frames f
        cdef void *lost
        _check_levels(levels)
        _check_pieces(pieces, levels)
        memset(&job, 0, sizeof(job))
        if frames is not None:
            _load_frames(&f, frames)
            job.walk.frames = &f
        job.walk.soft_dirty = PTE_SOFT_DIRTY if soft_dirty else 0
        job.walk.most = _most_runs(&self._ram)
        job.walk.ram, job.root, job.levels, job.count = &self._ram, root, levels, pieces.shape[0]
        job.pieces = &pieces[0] if pieces.shape[0] else NULL
        self._begin()
        try:
            with nogil:
                lost = ovr_guarded(_walk, &job)
            self._done(lost)
            if job.status == WALK_NOMEM:
                raise MemoryError
            if job.status == WALK_CROWDED:
                raise GuestFault(
                    f"page tables lead to more than {job.walk.most} runs of pages, up to"
                    f" {job.walk.fault:#x}: the guest does not have that much memory",
                    job.walk.fault,
                )
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

    def copy_in(
        self, const Run[::1] runs not None, int fd, int64_t base, int64_t size, *, bint wait=True
    ):
        cdef Reading job
        cdef HoldPage *gate = self._gate()
        _check_source(base, size)
        self._check_runs(runs, size)
        if runs.shape[0] == 0:
            return 0
        job.ram, job.runs, job.count = &self._ram, &runs[0], runs.shape[0]
        job.fd, job.base, job.flags = fd, base, 0 if wait else RWF_NOWAIT
        job.at, job.done, job.copied, job.error, job.lost = 0, 0, 0, 0, NULL
        job.gate, job.generation, job.entry = gate, 0, GATE_ENTERED
        self._users += 1
        try:
            with nogil:
                _copy_in(&job)
        finally:
            self._users -= 1
        _entered(job.entry)
        if job.error == EFAULT:
            self._done(job.lost)
        _check_error(job.error)
        return job.copied

    def copy_from(self, const Run[::1] runs not None, const uint8_t[::1] source not None):
        cdef Pouring job
        memset(&job, 0, sizeof(job))
        self._check_runs(runs, source.shape[0])
        if runs.shape[0] == 0:
            return 0
        job.source = &source[0]
        return self._pour(&job, runs)

    def copy_across(self, const Run[::1] runs not None, RamMap other not None):
        cdef Pouring job
        memset(&job, 0, sizeof(job))
        self._check_across(runs, other)
        if runs.shape[0] == 0:
            return 0
        job.other = &other._ram
        other._users += 1
        try:
            return self._pour(&job, runs, other)
        finally:
            other._users -= 1

    cdef _pour(self, Pouring *job, const Run[::1] runs, RamMap other=None):
        cdef HoldPage *gate = self._gate()
        cdef void *lost
        job.ram, job.runs, job.count, job.gate = &self._ram, &runs[0], runs.shape[0], gate
        self._begin()
        try:
            with nogil:
                lost = ovr_guarded(_pour, job)
                if job.inside:
                    gate_leave(gate)
            self._done(lost, other)
        finally:
            self._users -= 1
        _entered(job.entry)
        return job.copied

    def copy_to(
        self, const Run[::1] runs not None, uint8_t[::1] target not None,
        uint8_t[::1] zero not None,
    ):
        cdef Drawing job
        cdef void *lost
        self._check_runs(runs, target.shape[0])
        _check_marks(runs, zero.shape[0])
        if runs.shape[0] == 0:
            return 0
        job.ram, job.runs, job.count, job.copied = &self._ram, &runs[0], runs.shape[0], 0
        job.target, job.zero = &target[0], &zero[0]
        job.gate = self._hold._hold.page if self._hold is not None else NULL
        self._begin()
        try:
            with nogil:
                lost = ovr_guarded(_draw, &job)
            self._done(lost)
        finally:
            self._users -= 1
        return job.copied

    def review(
        self, const Run[::1] runs not None, int fd, int64_t base, int64_t size, *, bint wait=True
    ):
        cdef Reviewing job
        cdef void *lost
        _check_source(base, size)
        self._check_runs(runs, size)
        memset(&job, 0, sizeof(job))
        if runs.shape[0] == 0:
            return 0, None
        job.ram, job.runs, job.count = &self._ram, &runs[0], runs.shape[0]
        job.fd, job.base, job.flags = fd, base, 0 if wait else RWF_NOWAIT
        job.gate = self._hold._hold.page if self._hold is not None else NULL
        job.glass = <uint8_t *>malloc(GLASS)
        if job.glass == NULL:
            raise MemoryError
        self._begin()
        try:
            with nogil:
                lost = ovr_guarded(_review, &job)
            self._done(lost)
        finally:
            self._users -= 1
            free(job.glass)
        _check_error(job.error)
        return job.compared, job.differs if job.found else None

    def first_difference(self, const Run[::1] runs not None, const uint8_t[::1] source not None):
        cdef Matching job
        memset(&job, 0, sizeof(job))
        self._check_runs(runs, source.shape[0])
        if runs.shape[0] == 0:
            return None
        job.source = &source[0]
        return self._differ(&job, runs)

    def first_difference_across(self, const Run[::1] runs not None, RamMap other not None):
        cdef Matching job
        memset(&job, 0, sizeof(job))
        self._check_across(runs, other)
        if runs.shape[0] == 0:
            return None
        job.other = &other._ram
        other._users += 1
        try:
            return self._differ(&job, runs, other)
        finally:
            other._users -= 1

    cdef _differ(self, Matching *job, const Run[::1] runs, RamMap other=None):
        cdef void *lost
        job.ram, job.runs, job.count = &self._ram, &runs[0], runs.shape[0]
        self._begin()
        try:
            with nogil:
                lost = ovr_guarded(_differ, job)
            self._done(lost, other)
        finally:
            self._users -= 1
        return None if job.which == job.count else runs[job.which].gva + <uint64_t>job.at

    cdef _check_across(self, const Run[::1] runs, RamMap other):
        cdef Py_ssize_t i
        for i in range(runs.shape[0]):
            self._check(runs[i].gpa, runs[i].size)
            other._check(<uint64_t>runs[i].offset, runs[i].size)

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


cdef int _check_source(int64_t base, int64_t size) except -1:
    if base < 0 or size < 0 or base + size < base:
        raise ValueError(f"{size} bytes at {base} are not a range of a file")
    return 0


cdef int _check_error(int error) except -1:
    if error:
        raise OSError(EIO, CUT_OFF) if error == WAS_CUT_OFF else OSError(error, os.strerror(error))
    return 0


def in_page_cache(int fd, int64_t offset, int64_t size):
    cdef int64_t first = offset & ~<int64_t>4095
    if size <= 0 or offset < 0:
        raise ValueError(f"{size} bytes at {offset} are not a range of a file")
    return cached_pages(fd, first, size + offset - first) == (size + offset - first + 4095) >> 12


def is_in_memory(int fd):
    cdef int found = in_tmpfs(fd)
    if found < 0:
        raise OSError(errno, os.strerror(errno))
    return found == 1


def punch_hole(int fd, int64_t at, int64_t size):
    cdef int failed
    while True:
        with nogil:
            failed = punch(fd, at, size)
        if not failed:
            return
        if errno != EINTR:
            raise OSError(errno, os.strerror(errno))


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
