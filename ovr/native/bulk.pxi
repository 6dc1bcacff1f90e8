# Map ahead, copy and compare many pages at once.

cdef enum:
    # Minimum size of a range to map ahead by a system call.
    WORTH_ADVICE = 65536

    # Unit that the kernel maps on a read fault of a file: fault_around_bytes (mm/memory.c) or a
    # huge page.
    AROUND_SHIFT = 16
    HUGE_SHIFT = 21

    # UIO_MAXIOV of include/uapi/linux/uio.h
    MAX_VECTORS = 1024

    # Instead of an errno, which is at most 4095: the file ended before the read.
    WAS_CUT_OFF = 4096

    # Bytes copied between two checks of the gate: about 0.2 ms.
    CHUNK = 1 << 20

    # Bytes of the source read at once for a comparison: they fit into a core's cache.
    GLASS = 256 << 10

cdef packed struct Pair:
    int64_t one
    int64_t other
    uint64_t size

cdef struct Matching:
    const Ram *ram
    const Run *runs
    Py_ssize_t count
    const uint8_t *source   # or
    const Ram *other        # as for `Pouring`
    Py_ssize_t which        # index of the run that differs, `count` if none does
    int64_t at              # offset in that run

cdef struct Reading:
    const Ram *ram
    const Run *runs
    Py_ssize_t count
    int fd
    int flags               # of preadv2
    int64_t base            # offset of the source in the file
    Py_ssize_t at           # index of the next run; `done` bytes of it are copied
    uint64_t done
    uint64_t copied         # bytes, in the order of the runs
    HoldPage *gate
    uint32_t generation
    GateEntry entry         # last result of gate_enter()
    int error               # an errno; EFAULT is about guest RAM
    void *lost              # the address, if `error` is EFAULT
    iovec vectors[MAX_VECTORS]

cdef struct Pouring:
    const Ram *ram
    const Run *runs
    Py_ssize_t count
    const uint8_t *source   # or
    const Ram *other        # RAM of another guest, where `offset` of a run is a GPA
    uint64_t copied
    HoldPage *gate
    uint32_t generation
    GateEntry entry
    bint inside             # whether a jump left the work inside the gate

cdef struct Drawing:
    const Ram *ram
    const Run *runs
    Py_ssize_t count
    uint8_t *target
    uint8_t *zero           # for each page, in the order of the runs: whether it has zeros only
    const HoldPage *gate
    uint64_t copied         # bytes, in the order of the runs

cdef struct Reviewing:
    const Ram *ram
    const Run *runs
    Py_ssize_t count
    int fd
    int flags
    int64_t base
    const HoldPage *gate
    uint8_t *glass          # buffer for the source
    uint64_t compared       # bytes, in the order of the runs
    uint64_t differs        # GVA of the page that differs, if `found`
    bint found
    int error

cdef struct Mapping:
    const Ram *ram
    const Run *runs
    Py_ssize_t count
    int advice
    uint64_t seen           # keeps the compiler from dropping the reads

cdef struct Comparing:
    const uint8_t *one
    const uint8_t *other
    const Pair *pairs
    Py_ssize_t count
    uint8_t *equal


cdef void _map(void *given) noexcept nogil:
    # Errors do not matter here: pages not mapped ahead fault during the copy.
    cdef Mapping *job = <Mapping *>given
    cdef Py_ssize_t i
    cdef uint64_t size, at, end, first, around
    cdef Slot *slot
    for i in range(job.count):
        slot = _slot(job.ram, job.runs[i].gpa)
        if slot == NULL:
            continue
        at = (job.runs[i].gpa - slot.gpa) & ~<uint64_t>4095
        size = min(slot.size - at, job.runs[i].size)
        if size >= WORTH_ADVICE:
            madvise(slot.host + at, size, job.advice)
            continue
        first = <uint64_t>slot.host >> slot.around_shift
        at += <uint64_t>slot.host
        end = at + size
        while at < end:
            around = (at >> slot.around_shift) - first
            if not slot.looked[around]:
                _look(job, slot, at)
                slot.looked[around] = 1
            at = (first + around + 1) << slot.around_shift


cdef void _look(Mapping *job, const Slot *slot, uint64_t at) noexcept nogil:
    # A read fault maps the page and those around it that are in the page cache; of a shared file
    # for writing, too. It costs a cache miss, so one per unit is enough; pages not mapped by it
    # fault during the copy. Where pages should be huge but are not, populate them all.
    cdef uint64_t begin = <uint64_t>slot.host
    cdef uint64_t end = begin + slot.size
    if slot.around_shift == HUGE_SHIFT:
        begin = max(begin, at >> HUGE_SHIFT << HUGE_SHIFT)
        end = min(end, ((at >> HUGE_SHIFT) + 1) << HUGE_SHIFT)
        if madvise(<char *>begin, end - begin, MADV_POPULATE_READ) == 0:
            return
    job.seen ^= read_once(<char *>at)


cdef void _copy_in(Reading *job) noexcept nogil:
    # The kernel copies from its page cache to the RAM file. No page of the source is mapped, which
    # would cost as much as half of the copy, and a truncated source is an error, not a signal.
    # Stops early if the source is not in the page cache, or if the hold should end.
    cdef int64_t start = 0
    cdef int count
    cdef bint more = True
    while more and job.at < job.count:
        count = _gather(job, &start)
        job.entry = gate_enter(job.gate, &job.generation)
        if job.entry != GATE_ENTERED:
            return
        more = _read_chunk(job, count, start)
        gate_leave(job.gate)
        if gate_late(job.gate):
            return


cdef bint _read_chunk(Reading *job, int count, int64_t start) noexcept nogil:
    # Returns False if nothing more can be copied now.
    cdef ssize_t got
    cdef size_t part
    cdef int i = 0
    while i < count:
        got = preadv2(job.fd, &job.vectors[i], count - i, job.base + start, job.flags)
        if got < 0 and errno == EINTR:
            continue
        if got < 0 and errno == EAGAIN and job.flags & RWF_NOWAIT:
            return False
        if got <= 0:
            job.error = WAS_CUT_OFF if got == 0 else errno
            job.lost = job.vectors[i].iov_base
            return False
        start += got
        job.copied += <uint64_t>got
        while got > 0:
            part = min(<size_t>got, job.vectors[i].iov_len)
            job.vectors[i].iov_base = <char *>job.vectors[i].iov_base + part
            job.vectors[i].iov_len -= part
            got -= part
            if job.vectors[i].iov_len == 0:
                i += 1
    return True


cdef int _gather(Reading *job, int64_t *start) noexcept nogil:
    # Collect the destinations of the next bytes of the source, up to a gap in the source.
    cdef const Run *run = &job.runs[job.at]
    cdef int64_t at = run.offset + <int64_t>job.done
    cdef uint64_t part = 0
    cdef uint64_t left = CHUNK
    cdef char *host
    cdef char *end = NULL       # of the last vector
    cdef int count = 0
    start[0] = at
    while left and job.at < job.count:
        run = &job.runs[job.at]
        if run.offset + <int64_t>job.done != at:
            break
        if job.done < run.size:
            host = _host(job.ram, run.gpa + job.done, &part)
            part = min(min(part, run.size - job.done), left)
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
            left -= part
        if job.done == run.size:
            job.at += 1
            job.done = 0
    return count


cdef void _differ(void *given) noexcept nogil:
    cdef Matching *job = <Matching *>given
    for job.which in range(job.count):
        job.at = _differs(job.ram, &job.runs[job.which], job.source, job.other)
        if job.at >= 0:
            return
    job.which = job.count


cdef void _pour(void *given) noexcept nogil:
    # As `_copy_in`, from memory. If guest RAM was truncated, a jump leaves it inside the gate.
    cdef Pouring *job = <Pouring *>given
    cdef Py_ssize_t i
    cdef uint64_t done, part = 0
    cdef char *host
    cdef const uint8_t *source
    for i in range(job.count):
        done = 0
        while done < job.runs[i].size:
            host = _host(job.ram, job.runs[i].gpa + done, &part)
            part = min(min(part, job.runs[i].size - done), <uint64_t>CHUNK)
            source = _source(job.source, job.other, job.runs[i].offset + <int64_t>done, &part)
            job.entry = gate_enter(job.gate, &job.generation)
            if job.entry != GATE_ENTERED:
                return
            job.inside = True
            settle()
            memcpy(host, source, part)
            settle()
            gate_leave(job.gate)
            job.inside = False
            done += part
            job.copied += part
            if gate_late(job.gate):
                return


cdef const uint8_t *_source(
    const uint8_t *source, const Ram *other, int64_t offset, uint64_t *size
) noexcept nogil:
    # Where the source's bytes at `offset` are; limits `size` to those that follow one another.
    cdef uint64_t part = 0
    cdef char *host
    if other == NULL:
        return source + offset
    host = _host(other, <uint64_t>offset, &part)
    size[0] = min(size[0], part)
    return <const uint8_t *>host


cdef void _draw(void *given) noexcept nogil:
    # Stops early if the hold should end.
    cdef Drawing *job = <Drawing *>given
    cdef Py_ssize_t i
    cdef uint64_t done, part = 0
    cdef char *host
    for i in range(job.count):
        done = 0
        while done < job.runs[i].size:
            host = _host(job.ram, job.runs[i].gpa + done, &part)
            part = min(min(part, job.runs[i].size - done), <uint64_t>CHUNK)
            _mark_zero(host, part, job.zero + job.copied // 4096)
            memcpy(job.target + job.runs[i].offset + done, host, part)
            done += part
            job.copied += part
            if gate_late(job.gate):
                return


cdef void _mark_zero(const char *host, uint64_t size, uint8_t *zero) noexcept nogil:
    # Of most pages that is only the first word. Many pages are looked at before they are copied:
    # the cache misses overlap.
    cdef uint64_t at = 0
    while at < size:
        zero[0] = _is_zero(host + at)
        zero += 1
        at += 4096


cdef bint _is_zero(const char *page) noexcept nogil:
    return (<const uint64_t *>page)[0] == 0 and memcmp(page, page + 8, 4096 - 8) == 0


cdef void _review(void *given) noexcept nogil:
    # Stops early as `_copy_in` does. Several small runs share one read of the source.
    cdef Reviewing *job = <Reviewing *>given
    cdef Py_ssize_t i
    cdef uint64_t done, part
    cdef uint64_t there = 0     # bytes left in the buffer, and where they begin
    cdef uint64_t used = 0
    for i in range(job.count):
        done = 0
        while done < job.runs[i].size:
            if there == 0:
                there = _read_glass(job, i, done)
                used = 0
            part = min(there, job.runs[i].size - done)
            if part == 0 or _differs_from_glass(job, &job.runs[i], done, job.glass + used, part):
                return
            done += part
            used += part
            there -= part
            job.compared += part
            if gate_late(job.gate):
                return


cdef uint64_t _read_glass(Reviewing *job, Py_ssize_t i, uint64_t done) noexcept nogil:
    # Returns the bytes read, of runs that are adjacent in the source; 0 if they are not in the page
    # cache, or on an error.
    cdef int64_t offset = job.runs[i].offset + <int64_t>done
    cdef uint64_t size = job.runs[i].size - done
    cdef iovec vector
    cdef ssize_t got
    i += 1
    while size < GLASS and i < job.count and job.runs[i].offset == offset + <int64_t>size:
        size += job.runs[i].size
        i += 1
    while True:
        vector.iov_base = job.glass
        vector.iov_len = min(size, <uint64_t>GLASS)
        got = preadv2(job.fd, &vector, 1, job.base + offset, job.flags)
        if got > 0:
            return <uint64_t>got
        if got < 0 and errno == EINTR:
            continue
        if not (got < 0 and errno == EAGAIN and job.flags & RWF_NOWAIT):
            job.error = WAS_CUT_OFF if got == 0 else errno
        return 0


cdef bint _differs_from_glass(
    Reviewing *job, const Run *run, uint64_t begin, const uint8_t *glass, uint64_t size
) noexcept nogil:
    cdef uint64_t done = 0, part = 0
    cdef char *host
    while done < size:
        host = _host(job.ram, run.gpa + begin + done, &part)
        # Page by page of the run: `begin` may lie within one, after a short read.
        part = min(min(part, size - done), 4096 - ((begin + done) & 4095))
        if memcmp(host, glass + done, part):
            job.found = True
            job.differs = run.gva + ((begin + done) & ~<uint64_t>4095)
            return True
        done += part
    return False


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


cdef int64_t _differs(
    const Ram *ram, const Run *run, const uint8_t *source, const Ram *other
) noexcept nogil:
    # Offset in the run of the first page-sized step that differs, or -1.
    cdef uint64_t done = 0, part = 0
    cdef char *host
    cdef const uint8_t *theirs
    while done < run.size:
        host = _host(ram, run.gpa + done, &part)
        part = min(part, run.size - done, <uint64_t>4096)
        theirs = _source(source, other, run.offset + <int64_t>done, &part)
        if memcmp(host, theirs, part):
            return done
        done += part
    return -1


cdef int _check_marks(const Run[::1] runs, Py_ssize_t marks) except -1:
    # One for each page; and pages that are no parts of two pages.
    cdef Py_ssize_t i
    cdef uint64_t pages = 0
    for i in range(runs.shape[0]):
        if (runs[i].gpa | runs[i].size) & 4095:
            raise ValueError(f"run at {runs[i].gva:#x} has parts of pages")
        pages += runs[i].size // 4096
    if pages > <uint64_t>marks:
        raise ValueError(f"{marks} marks for {pages} pages")
    return 0


cdef int _check_range(int64_t offset, uint64_t size, uint64_t source_size) except -1:
    if size & 4095 or not size:
        raise ValueError(f"{size} bytes at {offset} are not whole pages")
    if offset < 0 or size > source_size or <uint64_t>offset > source_size - size:
        raise ValueError(f"{size} bytes at {offset} reach past the end of their source")
    return 0
