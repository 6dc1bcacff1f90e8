/*
 * Touch pages of held tasks, so that the kernel allocates them.
 *
 * Most of the time goes into zeroing pages in the kernel. So one thread for each CPU touches them,
 * with real-time priority, in a child of the agent.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/uio.h>
#include <unistd.h>

#include "agent.h"

#define PAGE 4096ull
#define HUGE_PAGE (2ull << 20)
#define HUGE_PAGES (HUGE_PAGE / PAGE)
#define MAX_THREADS 16
/* Present and exclusively mapped: Documentation/admin-guide/mm/pagemap.rst */
#define PAGEMAP_OWN (1ull << 63 | 1ull << 56)

static struct {
	pthread_mutex_t lock; /* protects the fields up to `error` */
	struct mp_reader ranges;
	uint64_t left;    /* ranges of this task that are not read yet */
	uint64_t at, end; /* rest of the current range */
	int error;
	pid_t pid;
	int mem, pagemap;
	enum touching how;
} job = {.lock = PTHREAD_MUTEX_INITIALIZER, .mem = -1, .pagemap = -1};

/* Take the next pages; they are within one huge page. */
static bool take(uint64_t *at, uint64_t *pages)
{
	struct mp_value start, size;
	uint64_t border;
	bool more;

	pthread_mutex_lock(&job.lock);
	if (job.at == job.end && job.left && mp_read(&job.ranges, &start) &&
	    mp_read(&job.ranges, &size)) {
		job.left--;
		job.at = start.number;
		job.end = start.number + size.number;
	}
	more = !job.error && job.at < job.end;
	if (more) {
		border = (job.at / HUGE_PAGE + 1) * HUGE_PAGE;
		*at = job.at;
		job.at = border < job.end ? border : job.end;
		*pages = (job.at - *at) / PAGE;
	}
	pthread_mutex_unlock(&job.lock);
	return more;
}

static void give_up(int error)
{
	pthread_mutex_lock(&job.lock);
	job.error = error;
	pthread_mutex_unlock(&job.lock);
}

/* Touch pages with the task's own permissions. Returns the number of pages touched. */
static uint64_t touch_writable(uint64_t at, uint64_t pages)
{
	static const char zeros[HUGE_PAGES];
	struct iovec from = {(void *)(uintptr_t)zeros, pages};
	struct iovec to[HUGE_PAGES];
	ssize_t done;

	for (uint64_t i = 0; i < pages; i++)
		to[i] = (struct iovec){(void *)(uintptr_t)(at + i * PAGE), 1};
	done = process_vm_writev(job.pid, &from, 1, to, pages, 0);
	return done < 0 ? 0 : (uint64_t)done;
}

bool touch_forced(int mem, uint64_t at, bool keep)
{
	char byte = 0;

	return (!keep || pread(mem, &byte, 1, (off_t)at) == 1) &&
	       pwrite(mem, &byte, 1, (off_t)at) == 1;
}

/* Touch one byte of a huge page, which allocates all of it if the kernel has one. */
static bool touch_huge(uint64_t at, uint64_t pages, uint64_t entries[HUGE_PAGES])
{
	ssize_t size = HUGE_PAGES * sizeof(*entries);

	return pages == HUGE_PAGES && job.how == TOUCH_DISCARD && touch_writable(at, 1) == 1 &&
	       pread(job.pagemap, entries, (size_t)size, (off_t)(at / PAGE * 8)) == size;
}

static bool read_pages(uint64_t at, uint64_t pages)
{
	char byte;

	for (uint64_t i = 0; i < pages; i++)
		if (pread(job.mem, &byte, 1, (off_t)(at + i * PAGE)) != 1)
			return false;
	return true;
}

static bool touch_pages(uint64_t at, uint64_t pages)
{
	uint64_t entries[HUGE_PAGES] = {0}, done, absent;
	bool keep = job.how == TOUCH_KEEP;

	if (job.how == TOUCH_READ)
		return read_pages(at, pages);
	touch_huge(at, pages, entries);
	for (uint64_t i = 0; i < pages; i += done) {
		for (absent = 0; i + absent < pages; absent++)
			if ((entries[i + absent] & PAGEMAP_OWN) == PAGEMAP_OWN)
				break;
		done = 1;
		if (!absent)
			continue;
		done = keep ? 0 : touch_writable(at + i * PAGE, absent);
		if (!done && !touch_forced(job.mem, at + i * PAGE, keep))
			return false;
		done = done ? done : 1;
	}
	return true;
}

static void *work(void *unused)
{
	uint64_t at, pages;

	(void)unused;
	while (take(&at, &pages))
		if (!touch_pages(at, pages))
			give_up(errno);
	return NULL;
}

static int open_file(pid_t pid, const char *name, int flags)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	return open(path, flags | O_CLOEXEC);
}

static long thread_count(uint64_t bytes)
{
	long count = sysconf(_SC_NPROCESSORS_ONLN);

	if (count > MAX_THREADS)
		count = MAX_THREADS;
	return count < (long)(bytes / HUGE_PAGE) ? count : (long)(bytes / HUGE_PAGE);
}

static bool open_task(pid_t pid)
{
	if (job.pid == pid)
		return true;
	close_fd(&job.mem);
	close_fd(&job.pagemap);
	job.pid = pid;
	job.mem = open_file(pid, "mem", O_RDWR);
	job.pagemap = open_file(pid, "pagemap", O_RDONLY);
	return job.mem >= 0;
}

/* Touch the next `count` ranges, all of one task. */
static int touch_portion(uint64_t count)
{
	struct mp_reader all = job.ranges;
	struct mp_value start, size;
	pthread_t threads[MAX_THREADS];
	uint64_t bytes = 0;
	long started = 0;

	for (uint64_t i = 0; i < count && mp_read(&all, &start) && mp_read(&all, &size); i++)
		bytes += size.number;
	job.left = count;
	while (started < thread_count(bytes) - 1 &&
	       !pthread_create(&threads[started], NULL, work, NULL))
		started++;
	work(NULL);
	while (started)
		pthread_join(threads[--started], NULL);
	return job.error;
}

int touch_portions(struct mp_reader portions, struct mp_reader ranges)
{
	struct portion portion;
	int error = 0;

	job.ranges = ranges;
	while (!error && read_portion(&portions, &portion)) {
		job.how = (enum touching)portion.how;
		error = open_task((pid_t)portion.pid) ? touch_portion(portion.count) : errno;
	}
	return error;
}
