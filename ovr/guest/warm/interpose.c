/*
 * Interposed libc functions: CRIU creates tasks by syscall() and their areas by
 * mmap(). A task gets its part of the pool, and its areas are moved from there.
 * A task that starts a session has a raised priority until the agent resets it.
 */
#include <linux/sched.h>

#include "library.h"

#define EXPORT __attribute__((visibility("default")))

extern int *__errno_location(void) __attribute__((weak));
EXPORT long syscall(long number, long a, long b, long c, long d, long e, long f);
EXPORT int setsid(void);
EXPORT void *mmap(void *at, size_t size, int prot, int flags, int fd, long offset);
EXPORT void *mmap64(void *at, size_t size, int prot, int flags, int fd, long offset);

static bool in_tree;              /* this process is a restored task, not CRIU */
static struct pool_task *current; /* this task's entry, NULL if it gets no memory */
static char *window;              /* CRIU's reservation */

static long with_errno(long result)
{
	if (!FAILED(result))
		return result;
	if (__errno_location)
		*__errno_location() = (int)-result;
	return -1;
}

static struct pool_task *find_task(uint64_t pid)
{
	for (uint64_t i = 0; i < table->tasks; i++)
		if (tasks[i].pid == pid)
			return &tasks[i];
	return NULL;
}

/*
 * Create a restored task. It gets its and its descendants' part of the pool;
 * the parent unmaps that part, so that the task is its only owner.
 */
static long fork_task(struct clone_args *args, size_t size)
{
	struct pool_task *task = find_task((uint64_t)*(int *)args->set_tid);
	bool first = !in_tree;
	long result;

	if (task && first)
		for (uint64_t i = 0; i < table->drops; i++)
			pool_advise(drops[i].from, drops[i].to, MADV_DONTNEED);
	if (task)
		pool_advise(task->from, task->to, MADV_DOFORK);
	if (first)
		real_time(false);
	result = call2(__NR_clone3, args, size);
	if (result && first)
		real_time(true);
	if (result == 0) {
		in_tree = true;
		current = task;
		window = NULL;
		if (task)
			pool_advise(task->from, task->to, MADV_DONTFORK);
	} else if (task) {
		uint64_t from = first ? 0 : task->from, to = first ? state->wanted : task->to;

		if (from < to)
			call2(__NR_munmap, pool + from, to - from);
	}
	return result;
}

long syscall(long number, long a, long b, long c, long d, long e, long f)
{
	struct clone_args *args = (struct clone_args *)a;

	/* Pass on calls with invalid arguments, with which CRIU probes for set_tid. */
	if (number == __NR_clone3 && table && (size_t)b >= CLONE_ARGS_SIZE_VER1 &&
	    args->set_tid_size && args->set_tid && args->set_tid + 4096 > 4096)
		return with_errno(fork_task(args, (size_t)b));
	return with_errno(raw(number, a, b, c, d, e, f));
}

/*
 * Where the kernel groups tasks by session (kernel/sched/autogroup.c), a nice
 * value is relative to the session, and a new session's own starts at 0.
 */
int setsid(void)
{
	long result = call1(__NR_setsid, 0);

	/* Without the file, or without permission, a restore only takes longer. */
	if (!FAILED(result) && in_tree)
		write_file("/proc/self/autogroup", "-20", 3);
	return (int)with_errno(result);
}

static bool is_in_place(const struct pool_row *row)
{
	return row->how == POOL_SERVE && current->base + row->at == (uint64_t)seat + row->from;
}

/* The part of the pool whose addresses match the reservation; empty unless `from` < `to`. */
static void find_in_place(uint64_t *from, uint64_t *to)
{
	*from = current->to;
	*to = current->from;
	for (uint64_t i = current->first; i < current->first + current->count; i++) {
		if (!is_in_place(&rows[i]))
			continue;
		if (rows[i].from < *from)
			*from = rows[i].from;
		if (rows[i].from + rows[i].size > *to)
			*to = rows[i].from + rows[i].size;
	}
}

static void move_part(uint64_t from, uint64_t to)
{
	long at = 0;

	if (from < to)
		at = raw(__NR_mremap, (long)(seat + from), (long)(to - from), (long)(to - from),
			 MREMAP_MAYMOVE | MREMAP_FIXED, (long)(pool + from), 0);
	if (FAILED(at))
		fail(at, "move a part of the pool");
}

static void reserve_part(char *from, char *to, int flags, int fd)
{
	long at = (long)from;

	if (from < to)
		at = map(from, (uint64_t)(to - from), PROT_NONE, flags | MAP_FIXED_NOREPLACE, fd,
			 0);
	if (at != (long)from)
		fail(FAILED(at) ? at : -EINVAL_NUMBER, "reserve the area around the pool");
}

/* Reserve the addresses around the part that is in place; move the rest of the pool away. */
static long reserve_around(uint64_t from, uint64_t to, uint64_t size, int flags, int fd)
{
	char *low = (char *)current->base, *high = low + size;
	long at = map(NULL, state->wanted, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (FAILED(at))
		fail(at, "reserve room for the pool");
	pool = (char *)at;
	move_part(current->from, from);
	move_part(to, current->to);
	reserve_part(low, seat + from, flags, fd);
	reserve_part(seat + to, high, flags, fd);
	window = low;
	return (long)window;
}

/* CRIU moves areas from here to their addresses; at `base` huge pages need not be split. */
static long reserve(uint64_t size, int flags, int fd)
{
	uint64_t from, to;
	long at;

	find_in_place(&from, &to);
	if (from < to)
		return reserve_around(from, to, size, flags, fd);
	at = map((void *)current->base, size, PROT_NONE, flags | MAP_FIXED_NOREPLACE, fd, 0);

	if (!FAILED(at) && at != (long)current->base) {
		call2(__NR_munmap, at, size);
		at = -1;
	}
	if (FAILED(at))
		at = map(NULL, size, PROT_NONE, flags, fd, 0);
	if (!FAILED(at))
		window = (char *)at;
	return at;
}

static const struct pool_row *find_row(uint64_t at, uint64_t size)
{
	uint64_t low = current->first, high = low + current->count;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (rows[middle].at < at)
			low = middle + 1;
		else
			high = middle;
	}
	if (low == current->first + current->count || rows[low].at != at || rows[low].size != size)
		return NULL;
	return &rows[low];
}

static long serve(const struct pool_row *row, char *at, int prot)
{
	long result = (long)at;

	if (at != seat + row->from)
		result = raw(__NR_mremap, (long)(pool + row->from), (long)row->size,
			     (long)row->size, MREMAP_MAYMOVE | MREMAP_FIXED, (long)at, 0);

	if (!FAILED(result) && prot != (PROT_READ | PROT_WRITE)) {
		long done = call3(__NR_mprotect, at, row->size, prot);

		result = FAILED(done) ? done : result;
	}
	if (FAILED(result))
		note(result, "move memory of the pool");
	else
		__atomic_fetch_add(&state->served, row->size, __ATOMIC_RELAXED);
	return result;
}

static long place(char *at, uint64_t size, int prot, int flags, int fd, long offset)
{
	const struct pool_row *row = find_row((uint64_t)(at - window), size);
	long result;

	if (!row)
		note(-EINVAL_NUMBER, "find an area in the table");
	if (row && row->how == POOL_SERVE) {
		result = serve(row, at, prot);
		if (!FAILED(result))
			return result;
	}
	if (row && row->how == POOL_WITHOUT_WRITE)
		prot &= ~PROT_WRITE;
	return map(at, size, prot, flags, fd, offset);
}

void *mmap(void *at, size_t size, int prot, int flags, int fd, long offset)
{
	bool served = current && current->count;
	long result;

	if (served && !window && !at && size == current->window && prot == PROT_NONE)
		result = reserve(size, flags, fd);
	else if (served && window && (flags & MAP_FIXED) && (char *)at >= window &&
		 (char *)at + size <= window + current->window)
		result = place(at, size, prot, flags, fd, offset);
	else
		result = map(at, size, prot, flags, fd, offset);
	return (void *)with_errno(result);
}

void *mmap64(void *at, size_t size, int prot, int flags, int fd, long offset)
{
	return mmap(at, size, prot, flags, fd, offset);
}
