/*
 * What the agent and the library in a CRIU that was started in advance say to
 * each other; the table is made by ovr/plan/pool/table.py.
 */
#ifndef OVR_POOL_H
#define OVR_POOL_H

#include <stdint.h>

#define POOL_PAGE 4096ull
#define POOL_UNIT (2ull << 20) /* a huge page */
#define POOL_MAX (1ull << 40)
#define POOL_SEAT 0x400000000000ull /* near there a pool is, if nothing else is */
#define POOL_SPAN (1ull << 30)      /* of a page table of huge pages */
#define POOL_ARGUMENTS 256          /* CRIU gets so many, padded with one that does nothing */
#define POOL_PADDING "--no-default-config"
#define POOL_REQUEST (256u << 10) /* bytes of strings at most */

/* The last page of the memfd that the library is loaded from. */
struct pool_state {
	/* the agent's words */
	uint64_t wanted; /* bytes, whole units */
	uint64_t place;  /* how far behind POOL_SEAT, whole units; less than a span */
	uint64_t agent;  /* its pid */
	uint64_t huge;   /* enum pool_huge */
	/* the library's words */
	uint64_t base;   /* where the pool is; 0: not yet */
	uint64_t served; /* bytes of areas that were made from it */
	uint64_t error;  /* an errno, and what it came from */
	char step[40];
};

enum pool_huge {
	POOL_HUGE_NEVER, /* the guest's administrator wants none */
	POOL_HUGE_ASKED, /* only where they are asked for */
	POOL_HUGE_ALWAYS,
};

/* After this on the socket: `size` bytes of strings, each with its NUL. */
struct pool_request {
	uint32_t size, arguments, variables;
};

/* The strings: where output goes, the table's path, the arguments, the environment. */

#define POOL_MAGIC 0x314d524157525655ull /* "UVRWARM1" */

struct pool_table {
	uint64_t magic, bytes;       /* how much of the pool it is about */
	uint64_t tasks, drops, rows; /* how many follow, in this order */
};

struct pool_task {
	uint64_t pid;      /* as in the images */
	uint64_t from, to; /* its and its descendants' part of the pool */
	/*
	 * CRIU's reservation: its size, and where it is best. Where that puts an area
	 * on its part of the pool, the area need not be moved there.
	 */
	uint64_t window, base;
	uint64_t first, count; /* rows */
};

struct pool_drop {
	uint64_t from, to; /* of the pool: pages that nobody needs */
};

enum pool_how {
	POOL_PLAIN,
	POOL_WITHOUT_WRITE, /* as CRIU maps it when it writes nothing there */
	POOL_SERVE,
};

/* An area, in the order of CRIU's reservation. */
struct pool_row {
	uint64_t at, size; /* in the reservation */
	uint64_t from;     /* in the pool */
	uint64_t how;
};

#endif
