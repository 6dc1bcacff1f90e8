/*
 * Interface between the agent and the library in a CRIU that was started in
 * advance; ovr/plan/pool/table.py makes the table.
 */
#ifndef OVR_POOL_H
#define OVR_POOL_H

#include <stdint.h>

#define POOL_PAGE 4096ull
#define POOL_UNIT (2ull << 20) /* a huge page */
#define POOL_MAX (1ull << 40)
#define POOL_SEAT 0x400000000000ull /* hint for the pool's address */
#define POOL_SPAN (1ull << 30)      /* covered by one page table of huge pages */
#define POOL_ARGUMENTS 256          /* number of CRIU's arguments, padded with one without effect */
#define POOL_PADDING "--no-default-config"
#define POOL_REQUEST (256u << 10) /* maximum bytes of strings */

/* The last page of the memfd that the library is loaded from. */
struct pool_state {
	/* written by the agent */
	uint64_t wanted; /* bytes, a multiple of POOL_UNIT */
	uint64_t place;  /* offset from POOL_SEAT, a multiple of POOL_UNIT, less than POOL_SPAN */
	uint64_t agent;  /* its pid */
	uint64_t huge;   /* enum pool_huge */
	/* written by the library */
	uint64_t base;   /* address of the pool; 0: not ready */
	uint64_t served; /* bytes of areas made from the pool */
	uint64_t error;  /* an errno, and the failed step */
	char step[40];
};

enum pool_huge {
	POOL_HUGE_NEVER, /* disabled in the guest */
	POOL_HUGE_ASKED, /* enabled for madvise() only */
	POOL_HUGE_ALWAYS,
};

/* Followed on the socket by `size` bytes of NUL-terminated strings. */
struct pool_request {
	uint32_t size, arguments, variables;
};

/* The strings: paths of the output and of the table, the arguments, the environment. */

#define POOL_MAGIC 0x314d524157525655ull /* "UVRWARM1" */

struct pool_table {
	uint64_t magic, bytes;       /* bytes: the part of the pool that is used */
	uint64_t tasks, drops, rows; /* numbers of structures that follow, in this order */
};

struct pool_task {
	uint64_t pid;      /* as in the images */
	uint64_t from, to; /* part of the pool for it and its descendants */
	/*
	 * CRIU's reservation: its size and preferred address. An area that is at its
	 * part of the pool then need not be moved.
	 */
	uint64_t window, base;
	uint64_t first, count; /* rows */
};

struct pool_drop {
	uint64_t from, to; /* pages of the pool that no task needs */
};

enum pool_how {
	POOL_PLAIN,
	POOL_WITHOUT_WRITE, /* as CRIU maps areas whose pages it does not write */
	POOL_SERVE,
};

/* An area; rows are in the order of CRIU's reservation. */
struct pool_row {
	uint64_t at, size; /* in the reservation */
	uint64_t from;     /* in the pool */
	uint64_t how;
};

#endif
