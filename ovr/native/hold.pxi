# Hold a VM: the gate for writes to guest RAM, and the requests to the tracer.

cdef extern from "hold.h" nogil:
    struct hold_page:
        uint32_t gate
        uint32_t generation
        uint32_t way
        int32_t who

    struct hold:
        hold_page *page
        int64_t bound_ns
        int64_t patience_ns
        int pid
        int tracer

    enum gate_entry:
        GATE_ENTERED
        GATE_IS_SHUT
        GATE_IS_BROKEN

    int hold_start(hold *) noexcept
    int hold_take(hold *) noexcept
    int hold_let_go(hold *) noexcept
    bint hold_alive(hold *) noexcept
    void hold_end(hold *) noexcept
    void hold_free(hold *) noexcept
    gate_entry gate_enter(hold_page *, uint32_t *) noexcept
    void gate_leave(hold_page *) noexcept
    bint gate_late(const hold_page *) noexcept

ctypedef hold_page HoldPage
ctypedef gate_entry GateEntry

cdef enum:
    SECOND = 1000000000


cdef class Hold:
    cdef hold _hold

    def __cinit__(self, int pid, *, double bound, double patience):
        cdef int error
        self._hold.pid = pid
        self._hold.bound_ns = <int64_t>(bound * SECOND)
        self._hold.patience_ns = <int64_t>(patience * SECOND)
        error = hold_start(&self._hold)
        if error:
            raise OSError(error, os.strerror(error))

    def __dealloc__(self):
        hold_free(&self._hold)

    def take(self):
        cdef int result
        with nogil:
            result = hold_take(&self._hold)
        return result

    def let_go(self):
        cdef int result
        with nogil:
            result = hold_let_go(&self._hold)
        return result

    def close(self):
        with nogil:
            hold_end(&self._hold)

    @property
    def tracer(self):
        return self._hold.tracer if hold_alive(&self._hold) else 0

    @property
    def way(self):
        return self._hold.page.way if self._hold.page != NULL else 0

    @property
    def who(self):
        return self._hold.page.who if self._hold.page != NULL else 0


cdef int _entered(GateEntry entry) except -1:
    if entry == GATE_IS_SHUT:
        raise PermissionError("guest RAM may be written only while the VM is held")
    if entry == GATE_IS_BROKEN:
        raise HoldBroken("the hold of the VM was broken off")
    return 0
