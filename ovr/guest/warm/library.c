/*
 * Loaded before all else into a `criu restore` that is started in advance.
 *
 * Its constructor allocates a pool of memory and waits for the agent. Then
 * CRIU's main gets the arguments of the real restore, and maps areas of the
 * restored tasks from the pool, since some functions of libc are ours: page
 * tables move, nothing is zeroed or copied.
 *
 * The pool goes to nobody but the tasks that it is for (MADV_DONTFORK), and
 * CRIU unmaps it, like this library, with all else that is not the task's.
 *
 * No libc: whatever CRIU was linked with is not known here.
 */
#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/mman.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/sched/types.h>
#include <stdbool.h>
#include <stddef.h>

#include "pool.h"

#define EXPORT __attribute__((visibility("default")))
#define FAILED(result) ((unsigned long)(result) > -4096ul)
#define MADV_POPULATE 23
#define MADV_COLLAPSE_NOW 25
#define CHUNK (64ull << 20)
#define SIGKILL_NUMBER 9
#define EINTR_NUMBER 4
#define EAGAIN_NUMBER 11
#define EINVAL_NUMBER 22

extern int *__errno_location(void) __attribute__((weak));
EXPORT long syscall(long number, long a, long b, long c, long d, long e, long f);
EXPORT void *mmap(void *at, size_t size, int prot, int flags, int fd, long offset);
EXPORT void *mmap64(void *at, size_t size, int prot, int flags, int fd, long offset);

static struct pool_state *state;
static char *pool;
static struct pool_table *table;
static struct pool_task *tasks;
static struct pool_drop *drops;
static struct pool_row *rows;
static bool in_tree;			/* we are in a restored task, not in CRIU */
static struct pool_task *current;	/* which one, if it gets anything */
static char *window;			/* CRIU's reservation */
static char *seat;			/* where the pool was made; `pool` is where it is */
static char text[POOL_REQUEST];
static char score[16];			/* /proc/self/oom_score_adj */

static long raw(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall" : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

#define call1(n, a) raw(n, (long)(a), 0, 0, 0, 0, 0)
#define call2(n, a, b) raw(n, (long)(a), (long)(b), 0, 0, 0, 0)
#define call3(n, a, b, c) raw(n, (long)(a), (long)(b), (long)(c), 0, 0, 0)

static long map(void *at, uint64_t size, int prot, int flags, int fd, long offset)
{
	return raw(__NR_mmap, (long)at, (long)size, prot, flags, fd, offset);
}

static long advise(uint64_t from, uint64_t to, int advice)
{
	return from < to ? call3(__NR_madvise, pool + from, to - from, advice) : 0;
}

static long with_errno(long result)
{
	if (!FAILED(result))
		return result;
	if (__errno_location)
		*__errno_location() = (int)-result;
	return -1;
}

static void note(long error, const char *step)
{
	size_t i;

	if (state->error)
		return;
	for (i = 0; step[i] && i < sizeof(state->step) - 1; i++)
		state->step[i] = step[i];
	state->step[i] = 0;
	state->error = (uint64_t)-error;
}

static __attribute__((noreturn)) void give_up(void)
{
	for (;;)
		call1(__NR_exit_group, 1);
}

static void fail(long error, const char *step)
{
	note(error, step);
	give_up();
}

/* ------------------------------------------------------------------------ the pool */

static void set_score(const char *value, size_t size)
{
	static const char path[] = "/proc/self/oom_score_adj";
	long fd = call3(__NR_open, path, O_WRONLY | O_CLOEXEC, 0);

	if (!FAILED(fd))
		call3(__NR_write, fd, value, size);
	call1(__NR_close, fd);
}

/* The OOM killer shall have us first; restored tasks shall not inherit that. */
static void offer_to_oom_killer(void)
{
	static const char path[] = "/proc/self/oom_score_adj";
	long fd = call3(__NR_open, path, O_RDONLY | O_CLOEXEC, 0);

	if (!FAILED(fd))
		call3(__NR_read, fd, score, sizeof(score) - 1);
	call1(__NR_close, fd);
	set_score("1000", 4);
}

static void populate(uint64_t from, uint64_t to)
{
	long result;

	do
		result = advise(from, to, MADV_POPULATE);
	while (result == -EINTR_NUMBER || result == -EAGAIN_NUMBER);
	if (FAILED(result))
		fail(result, "allocate the pool");
}

/*
 * MADV_HUGEPAGE would stay behind in the flags of the areas. To collapse a
 * unit leaves no trace, and zeroes it once if all but a page of it is absent.
 */
static void fill(uint64_t size)
{
	for (uint64_t at = 0, end; at < size; at = end) {
		end = at + CHUNK < size ? at + CHUNK : size;
		for (uint64_t unit = at; state->huge == POOL_HUGE_ASKED && unit < end; unit += POOL_UNIT) {
			*(volatile char *)(pool + unit) = 0;
			advise(unit, unit + POOL_UNIT, MADV_COLLAPSE_NOW);
		}
		populate(at, end);
		if (state->huge == POOL_HUGE_ALWAYS)
			advise(at, end, MADV_COLLAPSE_NOW);
	}
}

static void make_pool(void)
{
	uint64_t size = state->wanted;
	long at;

	if (!size || size % POOL_UNIT || size > POOL_MAX)
		fail(-EINVAL_NUMBER, "believe the pool's size");
	at = map((void *)POOL_SEAT, size + POOL_UNIT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (FAILED(at))
		fail(at, "reserve the pool");
	seat = pool = (char *)((at + (long)POOL_UNIT - 1) & -(long)POOL_UNIT);
	/* What is around it stays free for reservations. */
	if (pool > (char *)at)
		call2(__NR_munmap, at, pool - (char *)at);
	call2(__NR_munmap, pool + size, (char *)at + POOL_UNIT - pool);
	at = map(pool, size, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if (!FAILED(at))
		at = advise(0, size, MADV_DONTFORK);
	if (FAILED(at))
		fail(at, "map the pool");
	fill(size);
	state->base = (uint64_t)pool;
}

/* ------------------------------------------------------------------------ the request */

static void receive(void *to, size_t size)
{
	for (size_t done = 0; done < size;) {
		long result = call3(__NR_read, 1, (char *)to + done, size - done);

		if (result == -EINTR_NUMBER)
			continue;
		/* The agent wants no pool any more, or is gone. */
		if (result <= 0)
			give_up();
		done += (size_t)result;
	}
}

static char *next(char **at)
{
	char *found = *at, *end = text + sizeof(text);

	while (*at < end && **at)
		++*at;
	if (*at == end)
		fail(-EINVAL_NUMBER, "read the request");
	++*at;
	return found;
}

static bool within(uint64_t from, uint64_t to, uint64_t limit)
{
	return from <= to && to <= limit && !(from % POOL_PAGE) && !(to % POOL_PAGE);
}

static bool table_is_good(uint64_t size)
{
	const uint64_t most = 1 << 24;

	if (size < sizeof(*table) || table->magic != POOL_MAGIC || table->bytes > state->wanted ||
	    table->tasks > most || table->drops > most || table->rows > most ||
	    size != sizeof(*table) + table->tasks * sizeof(*tasks) +
		    table->drops * sizeof(*drops) + table->rows * sizeof(*rows))
		return false;
	tasks = (struct pool_task *)(table + 1);
	drops = (struct pool_drop *)(tasks + table->tasks);
	rows = (struct pool_row *)(drops + table->drops);
	for (uint64_t i = 0; i < table->tasks; i++)
		if (!within(tasks[i].from, tasks[i].to, table->bytes) ||
		    tasks[i].first > table->rows || tasks[i].count > table->rows - tasks[i].first)
			return false;
	for (uint64_t i = 0; i < table->drops; i++)
		if (!within(drops[i].from, drops[i].to, table->bytes))
			return false;
	for (uint64_t i = 0; i < table->rows; i++)
		if (rows[i].how == POOL_SERVE && (rows[i].from > table->bytes ||
		    !within(rows[i].from, rows[i].from + rows[i].size, table->bytes)))
			return false;
	return true;
}

static void read_table(const char *path)
{
	long fd = call3(__NR_open, path, O_RDONLY | O_CLOEXEC, 0);
	long size = FAILED(fd) ? fd : call3(__NR_lseek, fd, 0, 2);
	long at;

	if (FAILED(size))
		fail(size, "open the table");
	at = map(NULL, (uint64_t)size + 1, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (FAILED(at))
		fail(at, "get memory for the table");
	table = (struct pool_table *)at;
	for (long done = 0, got; done < size; done += got) {
		got = raw(__NR_pread64, fd, at + done, size - done, done, 0, 0);
		if (got <= 0)
			fail(got, "read the table");
	}
	call1(__NR_close, fd);
	if (!table_is_good((uint64_t)size))
		fail(-EINVAL_NUMBER, "believe the table");
}

static void redirect(const char *output)
{
	long null = call3(__NR_open, "/dev/null", O_RDWR | O_CLOEXEC, 0);
	long out = call3(__NR_open, output, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);

	if (FAILED(null) || FAILED(out))
		fail(FAILED(null) ? null : out, "open criu.out");
	call3(__NR_dup3, null, 0, 0);
	call3(__NR_dup3, out, 1, 0);
	call3(__NR_dup3, out, 2, 0);
	call1(__NR_close, null);
	call1(__NR_close, out);
}

static void real_time(bool on)
{
	struct { int priority; } parameter = {on};

	call3(__NR_sched_setscheduler, 0, on ? SCHED_FIFO : SCHED_NORMAL, &parameter);
}

/*
 * In a busy guest. CRIU gives the restored threads a policy and a nice value of
 * their own, but not a timer slack; real-time tasks have none, and it is
 * inherited. So tasks are made by, and are themselves, no real-time tasks.
 */
static void hurry(void)
{
	call3(__NR_setpriority, 0, 0, -20);
	real_time(true);
}

static void wait_for_request(int argc, char **argv, char **envp)
{
	struct pool_request request;
	char *at = text, *output, *path;
	uint32_t slots = 0;

	while (envp[slots])
		slots++;
	receive(&request, sizeof(request));
	if (request.size > sizeof(text) || request.arguments > (uint32_t)argc ||
	    request.variables > slots)
		fail(-EINVAL_NUMBER, "believe the request");
	receive(text, request.size);
	output = next(&at);
	path = next(&at);
	for (uint32_t i = 0; i < request.arguments; i++)
		argv[i] = next(&at);
	for (uint32_t i = 0; i < request.variables; i++)
		envp[i] = next(&at);
	for (uint32_t i = request.variables; i < slots; i++)
		envp[i] = NULL;
	read_table(path);
	redirect(output);
	set_score(score, sizeof(score) - 1);
	call2(__NR_prctl, PR_SET_PDEATHSIG, 0);
	hurry();
}

static bool is_ours(char *const *envp)
{
	static const char wanted[] = "LD_PRELOAD=/proc/self/fd/0";
	size_t i = 0;

	if (!envp[0])
		return false;
	while (wanted[i] && envp[0][i] == wanted[i])
		i++;
	return !wanted[i] && !envp[0][i];
}

__attribute__((constructor)) static void start(int argc, char **argv, char **envp)
{
	static const char ready = 'r';
	long size, at;

	if (!is_ours(envp))
		return;
	size = call3(__NR_lseek, 0, 0, 2);
	at = FAILED(size) ? size : map(NULL, POOL_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, 0,
				       size - (long)POOL_PAGE);
	if (FAILED(at))
		give_up();
	state = (struct pool_state *)at;
	call2(__NR_prctl, PR_SET_PDEATHSIG, SIGKILL_NUMBER);
	if (call1(__NR_getppid, 0) != (long)state->agent)
		give_up();
	offer_to_oom_killer();
	make_pool();
	call3(__NR_write, 1, &ready, 1);
	wait_for_request(argc, argv, envp);
}

/* ------------------------------------------------------------------------ what CRIU calls */

static struct pool_task *find_task(uint64_t pid)
{
	for (uint64_t i = 0; i < table->tasks; i++)
		if (tasks[i].pid == pid)
			return &tasks[i];
	return NULL;
}

/*
 * A restored task is born. It gets its part of the pool and its descendants';
 * whoever made it keeps none of that, so that the task is the only owner.
 */
static long fork_task(struct clone_args *args, size_t size)
{
	struct pool_task *task = find_task((uint64_t)*(int *)args->set_tid);
	bool first = !in_tree;
	long result;

	if (task && first)
		for (uint64_t i = 0; i < table->drops; i++)
			advise(drops[i].from, drops[i].to, MADV_DONTNEED);
	if (task)
		advise(task->from, task->to, MADV_DOFORK);
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
			advise(task->from, task->to, MADV_DONTFORK);
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

	/* Whether there is set_tid at all CRIU finds out with bad arguments. */
	if (number == __NR_clone3 && table && (size_t)b >= CLONE_ARGS_SIZE_VER1 &&
	    args->set_tid_size && args->set_tid && args->set_tid + 4096 > 4096)
		return with_errno(fork_task(args, (size_t)b));
	return with_errno(raw(number, a, b, c, d, e, f));
}

static bool is_in_place(const struct pool_row *row)
{
	return row->how == POOL_SERVE && seat == (char *)POOL_SEAT &&
	       current->base + row->at == POOL_SEAT + row->from;
}

/* The part of the pool that is where the reservation wants it: none if `from` is not below `to`. */
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
	long at = from < to ? raw(__NR_mremap, (long)(seat + from), (long)(to - from),
				  (long)(to - from), MREMAP_MAYMOVE | MREMAP_FIXED,
				  (long)(pool + from), 0) : 0;

	if (FAILED(at))
		fail(at, "move a part of the pool");
}

static void reserve_part(char *from, char *to, int flags, int fd)
{
	long at = from < to ? map(from, (uint64_t)(to - from), PROT_NONE,
				  flags | MAP_FIXED_NOREPLACE, fd, 0) : (long)from;

	if (at != (long)from)
		fail(FAILED(at) ? at : -EINVAL_NUMBER, "reserve what is around the pool");
}

/* The reservation around what is in its place; the rest of the pool is moved away. */
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

/* CRIU moves areas from here to where they belong: best if huge pages stay whole. */
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
	long result;

	if (!current || !current->count)
		result = map(at, size, prot, flags, fd, offset);
	else if (!window && !at && size == current->window && prot == PROT_NONE)
		result = reserve(size, flags, fd);
	else if (window && (flags & MAP_FIXED) && (char *)at >= window &&
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
