/* Receive the request for a restore: CRIU's arguments and environment, and the table of areas. */
#include <linux/prctl.h>
#include <linux/sched.h>

#include "library.h"

struct pool_table *table;
struct pool_task *tasks;
struct pool_drop *drops;
struct pool_row *rows;
static char text[POOL_REQUEST];

static void receive(void *to, size_t size)
{
	for (size_t done = 0; done < size;) {
		long result = call3(__NR_read, 1, (char *)to + done, size - done);

		if (result == -EINTR_NUMBER)
			continue;
		/* The agent has closed the pool, or is gone. */
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
	    size != sizeof(*table) + table->tasks * sizeof(*tasks) + table->drops * sizeof(*drops) +
			    table->rows * sizeof(*rows))
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
		if (rows[i].how == POOL_SERVE &&
		    (rows[i].from > table->bytes ||
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
	at = map(NULL, (uint64_t)size + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		 0);
	if (FAILED(at))
		fail(at, "allocate memory for the table");
	table = (struct pool_table *)at;
	for (long done = 0, got; done < size; done += got) {
		got = raw(__NR_pread64, fd, at + done, size - done, done, 0, 0);
		if (got <= 0)
			fail(got, "read the table");
	}
	call1(__NR_close, fd);
	if (!table_is_good((uint64_t)size))
		fail(-EINVAL_NUMBER, "accept the table");
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

void real_time(bool on)
{
	struct {
		int priority;
	} parameter = {on};

	call3(__NR_sched_setscheduler, 0, on ? SCHED_FIFO : SCHED_NORMAL, &parameter);
}

/*
 * Raise CRIU's priority. CRIU sets policy and nice value of restored threads,
 * but not their timer slack, which is 0 in children of real-time tasks. So CRIU
 * is not a real-time task while it creates tasks.
 */
static void hurry(void)
{
	call3(__NR_setpriority, 0, 0, -20);
	real_time(true);
}

void request_wait(int argc, char **argv, char **envp)
{
	struct pool_request request = {0};
	char *at = text, *output, *path;
	uint32_t slots = 0;

	while (envp[slots])
		slots++;
	receive(&request, sizeof(request));
	if (request.size > sizeof(text) || request.arguments > (uint32_t)argc ||
	    request.variables > slots)
		fail(-EINVAL_NUMBER, "accept the request");
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
	oom_as_before();
	call2(__NR_prctl, PR_SET_PDEATHSIG, 0);
	hurry();
}
