/*
 * The library preloaded into a `criu restore` started in advance: shared
 * declarations.
 *
 *   library.c	the constructor, errors
 *   pool.c	the memory
 *   request.c	the agent's request for a restore
 *   interpose.c	functions of libc that CRIU calls
 *
 * No libc: the one that CRIU is linked with is not known here.
 */
#ifndef OVR_LIBRARY_H
#define OVR_LIBRARY_H

#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/mman.h>
#include <stdbool.h>
#include <stddef.h>

#include "pool.h"

#define FAILED(result) ((unsigned long)(result) > -4096ul)
#define EINTR_NUMBER 4
#define EAGAIN_NUMBER 11
#define EINVAL_NUMBER 22

/* Symbols of this library must not interpose on symbols of CRIU. */
#pragma GCC visibility push(hidden)

/* ------------------------------------------------------------------------ system calls */

static inline long raw(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

#define call1(n, a) raw(n, (long)(a), 0, 0, 0, 0, 0)
#define call2(n, a, b) raw(n, (long)(a), (long)(b), 0, 0, 0, 0)
#define call3(n, a, b, c) raw(n, (long)(a), (long)(b), (long)(c), 0, 0, 0)

static inline long map(void *at, uint64_t size, int prot, int flags, int fd, long offset)
{
	return raw(__NR_mmap, (long)at, (long)size, prot, flags, fd, offset);
}

/* library.c */
extern struct pool_state *state;
/* Report the first error to the agent. */
void note(long error, const char *step);
void fail(long error, const char *step);
void give_up(void) __attribute__((noreturn));
/* Write to an existing file; errors are ignored. */
void write_file(const char *path, const char *value, size_t size);

/* pool.c */
extern char *pool; /* where the pool is */
extern char *seat; /* where it was made */
void pool_make(void);
/* madvise() a part of the pool, unless it is empty. */
long pool_advise(uint64_t from, uint64_t to, int advice);
/* Be the OOM killer's first choice, until restored tasks would inherit that. */
void oom_take_us_first(void);
void oom_as_before(void);

/* request.c */
extern struct pool_table *table; /* NULL until a request is received */
extern struct pool_task *tasks;
extern struct pool_drop *drops;
extern struct pool_row *rows;
/* Wait for a request, and set arguments and environment of CRIU accordingly. */
void request_wait(int argc, char **argv, char **envp);
void real_time(bool on);

#pragma GCC visibility pop

#endif
