# Walk page tables, and check who owns the pages.

# arch/x86/include/asm/pgtable_types.h
cdef uint64_t PTE_PRESENT = 1
cdef uint64_t PTE_RW = 1 << 1
cdef uint64_t PTE_USER = 1 << 2
cdef uint64_t PTE_DIRTY = 1 << 6
cdef uint64_t PTE_PSE = 1 << 7
cdef uint64_t PTE_PROTNONE = 1 << 8
cdef uint64_t PTE_SOFT_DIRTY = 1 << 11
cdef uint64_t PTE_ADDRESS = 0x000FFFFFFFFFF000
# Where a dirty entry is write-protected: Dirty without Write would mean a shadow stack. Linux
# kernel commit fca4d413c5be ("x86/mm: Introduce _PAGE_SAVED_DIRTY") (in v6.6); unused in leaves
# before.
cdef uint64_t PTE_SAVED_DIRTY = <uint64_t>1 << 58

cdef enum:
    F_WRITE = 1
    F_USER = 2
    F_PROTNONE = 4
    F_OWNED = 8
    F_SOFT_DIRTY = 16

cdef enum:
    # Struct pages of scattered frames are scattered: cache translations of the array, one for each
    # of its large pages, enough for 128 GiB of guest RAM.
    VMEMMAP_SHIFT = 21
    VMEMMAP_PIECES = 1024
    # Prefetch distance of struct pages, in page table entries.
    FETCH_AHEAD = 48

cdef enum:
    WALK_OK = 0
    WALK_FAULT = -1
    WALK_NOMEM = -2
    WALK_CROWDED = -3

cdef enum:
    # A walk may find this many runs in any guest: some map the same pages at many addresses.
    RUNS_OF_ANY = 1 << 20

cdef packed struct Piece:
    uint64_t gva
    uint64_t size
    int64_t offset

cdef packed struct Run:
    uint64_t gva
    uint64_t gpa
    uint64_t size
    int64_t offset
    uint32_t flags
    uint32_t page_shift

cdef struct Vmemmap:
    uint64_t gva
    char *host              # NULL if not cached

cdef struct Frames:
    # Place of the guest's `struct page` array, and offsets of members.
    uint64_t root
    int levels
    uint64_t vmemmap
    uint64_t stride
    uint64_t flags
    uint64_t mapping
    uint64_t compound_head
    # Proof of ownership: bits of the page's flags, and of its folio's flags and mapping.
    uint64_t page_mask
    uint64_t folio_mask
    uint64_t folio_value
    uint64_t mapping_mask
    uint64_t mapping_value
    # Proof that reclaim keeps a page's content: see `ovr.memory.paging.Frames`.
    uint64_t dirty_mask
    uint64_t clean_mask
    uint64_t clean_value
    Vmemmap known[VMEMMAP_PIECES]

cdef struct Walk:
    const Ram *ram
    Run *runs
    size_t count
    size_t capacity
    size_t most             # page tables that lead to themselves have runs without end
    Frames *frames
    uint64_t soft_dirty     # the bit of an entry that tells pages apart; 0: none does
    uint64_t fault          # GPA of a table that is not in RAM, when status is WALK_FAULT
    Piece piece             # being walked: gives each run its source offset

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
    cdef uint64_t ahead = at
    cdef uint64_t entry
    cdef int status = WALK_OK
    while at <= end and status == WALK_OK:
        while w.frames != NULL and ahead <= min(at + FETCH_AHEAD, end):
            _fetch(w.frames, read_once(table + ahead * 8))
            ahead += 1
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
    if entry & w.soft_dirty:
        flags |= F_SOFT_DIRTY
    if w.frames != NULL and _owned(w.ram, w.frames, frame >> 12, entry):
        flags |= F_OWNED
    return _emit(w, start, frame + inside, last - start + 1, flags, shift)


cdef bint _owned(const Ram *ram, Frames *f, uint64_t pfn, uint64_t entry) noexcept nogil:
    # True if the page's state is what `frames` requires: an anonymous page belongs to one process
    # alone, a page of shared memory to the given object; and reclaim will not drop the content
    # written to it.
    cdef uint64_t gva = f.vmemmap + pfn * f.stride
    cdef char *page = _page(ram, f, gva)
    cdef uint64_t head, flags
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
    flags = read_once(page + f.flags)
    return (
        flags & f.folio_mask == f.folio_value
        and read_once(page + f.mapping) & f.mapping_mask == f.mapping_value
        and _stays(f, flags, entry)
    )


cdef inline bint _stays(const Frames *f, uint64_t flags, uint64_t entry) noexcept nogil:
    # Reclaim transfers the dirty bits of all page table entries to the folio, and drops a folio
    # that is still clean if its content is on disk or was given up (MADV_FREE).
    if flags & f.dirty_mask or entry & (PTE_DIRTY | PTE_SAVED_DIRTY):
        return True
    return f.clean_mask and flags & f.clean_mask == f.clean_value


cdef char *_page(const Ram *ram, Frames *f, uint64_t gva) noexcept nogil:
    cdef uint64_t piece = <uint64_t>1 << VMEMMAP_SHIFT
    cdef uint64_t inside = gva & (piece - 1)
    cdef Vmemmap *known = &f.known[(gva >> VMEMMAP_SHIFT) & (VMEMMAP_PIECES - 1)]
    cdef uint64_t gpa = 0
    cdef uint64_t available = 0
    cdef uint64_t in_slot = 0
    cdef char *host
    if gva & 7:  # a folio's head is an address read from the guest
        return NULL
    if known.host != NULL and known.gva == gva - inside and piece - inside >= f.stride:
        return known.host + inside
    if not _translate(ram, f.root, f.levels, gva, &gpa, &available):
        return NULL
    host = _host(ram, gpa, &in_slot)
    if host == NULL or min(available, in_slot) < f.stride:
        return NULL
    # Cached only if the whole piece is in one page of the guest, and in one slot.
    if available + inside >= piece and gpa >= inside:
        if _host(ram, gpa - inside, &in_slot) == host - inside and in_slot >= piece:
            known.gva = gva - inside
            known.host = host - inside
    return host


cdef void _fetch(Frames *f, uint64_t entry) noexcept nogil:
    # Only in cached pieces: a wrong or missing guess costs a little time.
    cdef uint64_t gva = f.vmemmap + ((entry & PTE_ADDRESS) >> 12) * f.stride
    cdef uint64_t inside = gva & ((<uint64_t>1 << VMEMMAP_SHIFT) - 1)
    cdef Vmemmap *known = &f.known[(gva >> VMEMMAP_SHIFT) & (VMEMMAP_PIECES - 1)]
    if known.host != NULL and known.gva == gva - inside:
        prefetch(known.host + inside)


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
    if w.count == w.most:
        w.fault = gva
        return WALK_CROWDED
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


cdef size_t _most_runs(const Ram *ram) noexcept:
    # Twice as many as the RAM has pages.
    cdef size_t bytes = 0
    cdef Py_ssize_t i
    for i in range(ram.count):
        bytes += ram.slots[i].size
    return max(<size_t>RUNS_OF_ANY, 2 * (bytes >> 12))


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
    f.dirty_mask = frames.dirty_mask
    f.clean_mask = frames.clean_mask
    f.clean_value = frames.clean_value
    _check_levels(f.levels)
    if not 8 <= f.stride <= 4096 or (f.vmemmap | f.stride) & 7 or not f.mapping_mask:
        raise ValueError("this is no usable description of a struct page array")
    if max(f.flags, f.mapping, f.compound_head) + 8 > f.stride:
        raise ValueError("a member of struct page lies outside of it")
    return 0
