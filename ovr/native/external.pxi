# Declarations of C: the guard, system calls, compiler builtins.

cdef extern from "guard.h":
    void ovr_guard_install() noexcept
    void *ovr_guarded(void (*)(void *) noexcept nogil, void *) noexcept nogil

cdef extern from *:
    """
    #include <fcntl.h>
    #include <string.h>
    #include <stdint.h>
    #include <unistd.h>
    #include <sys/syscall.h>
    #include <sys/vfs.h>
    #include <linux/magic.h>

    #ifndef SYS_cachestat
    #define SYS_cachestat 451 /* in v6.5 */
    #endif

    /* How many pages of a range of a file are in the page cache; -1 if the kernel cannot tell. */
    static inline int64_t ovr_cached_pages(int fd, uint64_t offset, uint64_t size)
    {
        uint64_t range[2] = {offset, size}, found[5];

        return syscall(SYS_cachestat, fd, range, found, 0u) ? -1 : (int64_t)found[0];
    }

    /* Page size of the file's mappings, larger in a hugetlbfs; 0 on error. */
    static inline uint64_t ovr_mapping_unit(int fd)
    {
        struct statfs info;

        if (fstatfs(fd, &info) != 0)
            return 0;
        return info.f_type == HUGETLBFS_MAGIC ? (uint64_t)info.f_bsize : 4096;
    }

    /* 1: the file is in a tmpfs; 0: it is not; -1 and errno. */
    static inline int ovr_in_tmpfs(int fd)
    {
        struct statfs info;

        return fstatfs(fd, &info) ? -1 : info.f_type == TMPFS_MAGIC;
    }

    static inline int ovr_punch_hole(int fd, int64_t at, int64_t size)
    {
        return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, size);
    }

    /* The guest may change any word while we look at it: read it once, whole. */
    static inline uint64_t ovr_read_once(const void *p)
    {
        return __atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED);
    }

    static inline void ovr_prefetch(const void *p)
    {
        __builtin_prefetch(p);
        /* Otherwise GCC takes a caller that does nothing else for a pure function, and drops it. */
        __asm__ volatile("");
    }

    /* Make earlier stores reach memory before guarded work is left by a jump. */
    static inline void ovr_settle(void)
    {
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
    }
    """
    uint64_t read_once "ovr_read_once"(const void *) noexcept nogil
    void prefetch "ovr_prefetch"(const void *) noexcept nogil
    void settle "ovr_settle"() noexcept nogil
    int in_tmpfs "ovr_in_tmpfs"(int) noexcept nogil
    int punch "ovr_punch_hole"(int, int64_t, int64_t) noexcept nogil
    int64_t cached_pages "ovr_cached_pages"(int, uint64_t, uint64_t) noexcept nogil
    uint64_t mapping_unit "ovr_mapping_unit"(int) noexcept nogil
    void *memmem(const void *, size_t, const void *, size_t) noexcept nogil

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

    ssize_t preadv2(int, const iovec *, int, int64_t, int)

cdef extern from "Python.h":
    bytes PyBytes_FromStringAndSize(const char *, Py_ssize_t)

cdef enum:
    MADV_POPULATE_READ = 22
    MADV_POPULATE_WRITE = 23
    RWF_NOWAIT = 8
