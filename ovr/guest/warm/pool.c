/* The pool's memory, allocated in advance. */
#include "library.h"

#define MADV_POPULATE 23
#define MADV_COLLAPSE_NOW 25
#define CHUNK (64ull << 20)

char *pool;
char *seat;
static char score[16]; /* /proc/self/oom_score_adj */

long pool_advise(uint64_t from, uint64_t to, int advice)
{
	return from < to ? call3(__NR_madvise, pool + from, to - from, advice) : 0;
}

static const char score_path[] = "/proc/self/oom_score_adj";

void oom_take_us_first(void)
{
	long fd = call3(__NR_open, score_path, O_RDONLY | O_CLOEXEC, 0);

	if (!FAILED(fd))
		call3(__NR_read, fd, score, sizeof(score) - 1);
	call1(__NR_close, fd);
	write_file(score_path, "1000", 4);
}

void oom_as_before(void)
{
	write_file(score_path, score, sizeof(score) - 1);
}

static void populate(uint64_t from, uint64_t to)
{
	long result;

	do
		result = pool_advise(from, to, MADV_POPULATE);
	while (result == -EINTR_NUMBER || result == -EAGAIN_NUMBER);
	if (FAILED(result))
		fail(result, "allocate the pool");
}

/*
 * MADV_HUGEPAGE would leave a flag in the areas, MADV_COLLAPSE leaves none. It
 * zeroes a unit only once if a single page of it is present.
 */
static void fill(uint64_t size)
{
	for (uint64_t at = 0, end; at < size; at = end) {
		end = at + CHUNK < size ? at + CHUNK : size;
		for (uint64_t unit = at; state->huge == POOL_HUGE_ASKED && unit < end;
		     unit += POOL_UNIT) {
			*(volatile char *)(pool + unit) = 0;
			pool_advise(unit, unit + POOL_UNIT, MADV_COLLAPSE_NOW);
		}
		populate(at, end);
		if (state->huge == POOL_HUGE_ALWAYS)
			pool_advise(at, end, MADV_COLLAPSE_NOW);
	}
}

void pool_make(void)
{
	uint64_t size = state->wanted;
	long at;

	if (!size || size % POOL_UNIT || size > POOL_MAX || state->place % POOL_UNIT ||
	    state->place >= POOL_SPAN)
		fail(-EINVAL_NUMBER, "accept the pool's size");
	at = map((void *)(POOL_SEAT + state->place), size + POOL_UNIT, PROT_NONE,
		 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (FAILED(at))
		fail(at, "reserve the pool");
	seat = pool = (char *)((at + (long)POOL_UNIT - 1) & -(long)POOL_UNIT);
	/* Unmap the surroundings, for CRIU's reservations. */
	if (pool > (char *)at)
		call2(__NR_munmap, at, pool - (char *)at);
	call2(__NR_munmap, pool + size, (char *)at + POOL_UNIT - pool);
	at = map(pool, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
		 0);
	if (!FAILED(at))
		at = pool_advise(0, size, MADV_DONTFORK);
	if (FAILED(at))
		fail(at, "map the pool");
	fill(size);
	state->base = (uint64_t)pool;
}
