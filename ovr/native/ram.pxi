# Where guest memory is on the host, and plain access to it.
#
# Nothing read from guest memory is trusted: an address is used only after `_host` has found it in
# a slot. Code that touches mapped files is guarded work (`guard.h`): a function of one struct,
# which has its arguments and results.

cdef struct Slot:
    uint64_t gpa
    uint64_t size
    char *host
    void *mapping           # contains the slot
    uint64_t mapped         # size of the mapping
    int around_shift        # log2 of the bytes that the kernel maps at once
    uint8_t *looked         # for each such unit, whether it was mapped ahead

cdef struct Ram:
    Slot *slots
    Py_ssize_t count

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


cdef Slot *_slot(const Ram *ram, uint64_t gpa) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(ram.count):
        if gpa >= ram.slots[i].gpa and gpa - ram.slots[i].gpa < ram.slots[i].size:
            return &ram.slots[i]
    return NULL


cdef char *_host(const Ram *ram, uint64_t gpa, uint64_t *available) noexcept nogil:
    # Host address of `gpa`, or NULL; `available` bytes follow it in the same slot.
    cdef Slot *slot = _slot(ram, gpa)
    if slot == NULL:
        return NULL
    available[0] = slot.size - (gpa - slot.gpa)
    return slot.host + (gpa - slot.gpa)


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


cdef void _store(char *host, const uint8_t *source, uint64_t size) noexcept nogil:
    # A kernel field must never be seen half-written: naturally aligned words go out in one store.
    if size == 8 and not <uint64_t>host & 7:
        (<uint64_t *>host)[0] = (<const uint64_t *>source)[0]
    elif size == 4 and not <uint64_t>host & 3:
        (<uint32_t *>host)[0] = (<const uint32_t *>source)[0]
    else:
        memcpy(host, source, size)


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


cdef char *_find_stepped(
    char *host, size_t size, const uint8_t *needle, size_t length, size_t step
) noexcept nogil:
    cdef size_t at = 0
    while at + length <= size:
        if memcmp(host + at, needle, length) == 0:
            return host + at
        at += step
    return NULL
